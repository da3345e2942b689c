//! Messages to the resource manager, as bytes from a VM that may send any. What does not parse is refused with the
//! original's error; nothing is read that is not there.

use super::Vmid;
use crate::hyp::gunyah::error::RmError;

pub(crate) const DONATE: u32 = 0x5100_0010;
pub(crate) const ACCEPT: u32 = 0x5100_0011;
pub(crate) const LEND: u32 = 0x5100_0012;
pub(crate) const SHARE: u32 = 0x5100_0013;
pub(crate) const RELEASE: u32 = 0x5100_0014;
pub(crate) const RECLAIM: u32 = 0x5100_0015;
pub(crate) const NOTIFY: u32 = 0x5100_0017;
pub(crate) const APPEND: u32 = 0x5100_0018;

pub(crate) const SHARED: u32 = 0x5110_0011;
pub(crate) const RELEASED: u32 = 0x5110_0012;
pub(crate) const ACCEPTED: u32 = 0x5110_0013;
pub(crate) const RECALL: u32 = 0x5110_0014;

/// No list has more entries.
pub(crate) const MOST_ENTRIES: usize = 512;
/// As many bytes as 63 fragments carry.
const MOST_BYTES: usize = 232 * 63;

/// Who may have a parcel, and with what rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AclEntry {
    pub(crate) vmid: Vmid,
    pub(crate) rights: u8,
}

/// Bytes of a VM's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SglEntry {
    pub(crate) ipa: u64,
    pub(crate) size: u64,
}

/// As what a VM maps a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttrEntry {
    pub(crate) attr: u16,
    pub(crate) vmid: Vmid,
}

/// What becomes of memory that is in a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Transfer {
    Donate = 0,
    Lend = 1,
    Share = 2,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Create {
    pub(crate) transfer: Transfer,
    pub(crate) mem_type: u8,
    pub(crate) flags: u8,
    pub(crate) label: u32,
    pub(crate) acl: Vec<AclEntry>,
    pub(crate) sgl: Vec<SglEntry>,
    pub(crate) attrs: Vec<AttrEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Accept {
    pub(crate) handle: u32,
    pub(crate) mem_type: u8,
    pub(crate) transfer: u8,
    pub(crate) flags: u8,
    pub(crate) label: u32,
    pub(crate) acl: Vec<AclEntry>,
    pub(crate) sgl: Vec<SglEntry>,
    pub(crate) map_vmid: Vmid,
    pub(crate) attrs: Vec<AttrEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Create(Create),
    Accept(Accept),
    Append {
        handle: u32,
        flags: u8,
        sgl: Vec<SglEntry>,
    },
    Release {
        handle: u32,
        flags: u8,
    },
    Reclaim {
        handle: u32,
        flags: u8,
    },
    /// The list of VMs is read later: other errors come first.
    Notify {
        handle: u32,
        flags: u8,
        tag: u32,
        list: Vec<u8>,
    },
}

/// Bytes that are read from the front.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], RmError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(RmError::MsgInvalid)?;
        self.0 = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, RmError> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, RmError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, RmError> {
        self.take().map(u64::from_le_bytes)
    }

    /// A list, and the half word behind its length, if there is a list at all.
    fn list<T>(
        &mut self,
        entry: impl Fn(&mut Self) -> Result<T, RmError>,
    ) -> Result<(Vec<T>, Option<u16>), RmError> {
        if self.0.is_empty() {
            return Ok((Vec::new(), None));
        }
        let [low, high, a, b] = self.take()?;
        let nr = usize::from(u16::from_le_bytes([low, high]));
        if nr > MOST_ENTRIES {
            return Err(RmError::NoResource);
        }
        let entries: Result<Vec<_>, _> = (0..nr).map(|_| entry(self)).collect();
        Ok((entries?, Some(u16::from_le_bytes([a, b]))))
    }

    fn acl(&mut self) -> Result<AclEntry, RmError> {
        let [low, high, rights, _] = self.take()?;
        Ok(AclEntry { vmid: Vmid(u16::from_le_bytes([low, high])), rights })
    }

    fn sgl(&mut self) -> Result<SglEntry, RmError> {
        Ok(SglEntry { ipa: self.u64()?, size: self.u64()? })
    }

    fn attr(&mut self) -> Result<AttrEntry, RmError> {
        Ok(AttrEntry { attr: self.u16()?, vmid: Vmid(self.u16()?) })
    }

    fn end(self) -> Result<(), RmError> {
        self.0.is_empty().then_some(()).ok_or(RmError::MsgInvalid)
    }
}

/// Reads a message.
///
/// # Errors
/// `Unimplemented` for another number; `MsgInvalid` for too few bytes, or too many; `NoResource` for a list of more
/// than 512 entries.
pub(crate) fn parse(id: u32, body: &[u8]) -> Result<Request, RmError> {
    let shortest = match id {
        DONATE | LEND | SHARE => 20,
        ACCEPT => 24,
        RELEASE | RECLAIM => 8,
        NOTIFY | APPEND => 12,
        _ => return Err(RmError::Unimplemented),
    };
    if body.len() < shortest || body.len() > MOST_BYTES {
        return Err(RmError::MsgInvalid);
    }
    let mut bytes = Reader(body);
    match id {
        DONATE => create(Transfer::Donate, bytes),
        LEND => create(Transfer::Lend, bytes),
        SHARE => create(Transfer::Share, bytes),
        ACCEPT => accept(bytes),
        APPEND => {
            let (handle, [flags, ..]) = (bytes.u32()?, bytes.take::<4>()?);
            let (sgl, _) = bytes.list(Reader::sgl)?;
            bytes.end()?;
            Ok(Request::Append { handle, flags, sgl })
        }
        NOTIFY => {
            let (handle, [flags, ..], tag) = (bytes.u32()?, bytes.take::<4>()?, bytes.u32()?);
            Ok(Request::Notify { handle, flags, tag, list: bytes.0.to_vec() })
        }
        _ => {
            let (handle, [flags, ..]) = (bytes.u32()?, bytes.take::<4>()?);
            match id {
                RELEASE => Ok(Request::Release { handle, flags }),
                _ => Ok(Request::Reclaim { handle, flags }),
            }
        }
    }
}

fn create(transfer: Transfer, mut bytes: Reader<'_>) -> Result<Request, RmError> {
    let [mem_type, _, flags, _] = bytes.take()?;
    let label = bytes.u32()?;
    let (acl, _) = bytes.list(Reader::acl)?;
    let (sgl, _) = bytes.list(Reader::sgl)?;
    let (attrs, _) = bytes.list(Reader::attr)?;
    bytes.end()?;
    Ok(Request::Create(Create { transfer, mem_type, flags, label, acl, sgl, attrs }))
}

fn accept(mut bytes: Reader<'_>) -> Result<Request, RmError> {
    let handle = bytes.u32()?;
    let [mem_type, transfer, flags, _] = bytes.take()?;
    let label = bytes.u32()?;
    let (acl, _) = bytes.list(Reader::acl)?;
    let (sgl, map_vmid) = bytes.list(Reader::sgl)?;
    // The original reads it from behind the message then.
    let map_vmid = Vmid(map_vmid.ok_or(RmError::MsgInvalid)?);
    let (attrs, _) = bytes.list(Reader::attr)?;
    bytes.end()?;
    Ok(Request::Accept(Accept {
        handle,
        mem_type,
        transfer,
        flags,
        label,
        acl,
        sgl,
        map_vmid,
        attrs,
    }))
}

/// The VMs that a notification is for, which are all of a parcel's. Bytes behind the list do not matter.
///
/// # Errors
/// In this order: `MsgInvalid` without a length, `ArgumentInvalid` if it is zero, `MsgInvalid` for fewer bytes,
/// `ArgumentInvalid` for more VMs than `most`.
pub(crate) fn vmid_list(list: &[u8], most: usize) -> Result<Vec<Vmid>, RmError> {
    let mut bytes = Reader(list);
    let [low, high, ..] = bytes.take::<4>()?;
    let nr = usize::from(u16::from_le_bytes([low, high]));
    if nr == 0 {
        return Err(RmError::ArgumentInvalid);
    }
    if bytes.0.len() < nr * 4 {
        return Err(RmError::MsgInvalid);
    }
    if nr > most {
        return Err(RmError::ArgumentInvalid);
    }
    let ids =
        (0..nr).map(|_| bytes.take::<4>().map(|[low, high, ..]| u16::from_le_bytes([low, high])));
    ids.map(|id| id.map(Vmid)).collect()
}

/// What a VM is told without having asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notification {
    pub(crate) id: u32,
    pub(crate) body: Vec<u8>,
}
