//! Messages as a VM that means well writes them.

use super::super::rm::message::{
    ACCEPT, APPEND, Accept, AclEntry, AttrEntry, Create, DONATE, LEND, NOTIFY, RECLAIM, RELEASE,
    Request, SHARE, SglEntry, Transfer,
};

fn count(nr: usize, more: u16) -> Vec<u8> {
    let nr = u16::try_from(nr).unwrap_or(u16::MAX);
    nr.to_le_bytes().into_iter().chain(more.to_le_bytes()).collect()
}

fn acl(entries: &[AclEntry]) -> Vec<u8> {
    let mut bytes = count(entries.len(), 0);
    for entry in entries {
        bytes.extend(entry.vmid.0.to_le_bytes());
        bytes.extend([entry.rights, 0]);
    }
    bytes
}

fn sgl(entries: &[SglEntry], more: u16) -> Vec<u8> {
    let mut bytes = count(entries.len(), more);
    for entry in entries {
        bytes.extend(entry.ipa.to_le_bytes());
        bytes.extend(entry.size.to_le_bytes());
    }
    bytes
}

fn attrs(entries: &[AttrEntry]) -> Vec<u8> {
    let mut bytes = count(entries.len(), 0);
    for entry in entries {
        bytes.extend(entry.attr.to_le_bytes());
        bytes.extend(entry.vmid.0.to_le_bytes());
    }
    bytes
}

fn with_flags(handle: u32, flags: u8) -> Vec<u8> {
    handle.to_le_bytes().into_iter().chain([flags, 0, 0, 0]).collect()
}

/// A message's number and bytes.
pub(crate) fn encode(request: &Request) -> (u32, Vec<u8>) {
    match request {
        Request::Create(Create {
            transfer,
            mem_type,
            flags,
            label,
            acl: of,
            sgl: what,
            attrs: how,
        }) => {
            let id = match transfer {
                Transfer::Donate => DONATE,
                Transfer::Lend => LEND,
                Transfer::Share => SHARE,
            };
            let head = [*mem_type, 0, *flags, 0].into_iter().chain(label.to_le_bytes());
            let lists = [acl(of), sgl(what, 0), attrs(how)].concat();
            (id, head.chain(lists).collect())
        }
        Request::Accept(accept) => {
            let Accept { handle, mem_type, transfer, flags, label, .. } = accept;
            let mut bytes = handle.to_le_bytes().to_vec();
            bytes.extend([*mem_type, *transfer, *flags, 0]);
            bytes.extend(label.to_le_bytes());
            bytes.extend(acl(&accept.acl));
            bytes.extend(sgl(&accept.sgl, accept.map_vmid.0));
            bytes.extend(attrs(&accept.attrs));
            (ACCEPT, bytes)
        }
        Request::Append { handle, flags, sgl: what } => {
            (APPEND, [with_flags(*handle, *flags), sgl(what, 0)].concat())
        }
        Request::Release { handle, flags } => (RELEASE, with_flags(*handle, *flags)),
        Request::Reclaim { handle, flags } => (RECLAIM, with_flags(*handle, *flags)),
        Request::Notify { handle, flags, tag, list } => {
            let tag = tag.to_le_bytes().to_vec();
            (NOTIFY, [with_flags(*handle, *flags), tag, list.clone()].concat())
        }
    }
}
