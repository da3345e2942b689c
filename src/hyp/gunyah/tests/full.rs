//! The host, two guests that run, and whatever they ask of the resource manager.

use super::super::error::RmError;
use super::super::hostile::judge::Snapshot;
use super::super::hostile::wire::encode;
use super::super::rm::message::{
    Accept, AclEntry, AttrEntry, Create, Notification, Request, SglEntry, Transfer,
};
use super::super::rm::vm::Image;
use super::super::rm::{Fate, Parcel, Vmid, accept, create};
use super::super::touch::Bytes;
use super::super::{Gunyah, World};
use super::*;
use crate::addr::Ipa;

pub(super) const A: Vmid = Vmid(0x80);
pub(super) const B: Vmid = Vmid(0x81);
pub(super) const HOST: Vmid = Vmid::HLOS;
/// What guests begin with: a page each, at the end of memory.
pub(super) const IMAGES: u64 = RAM + NR_RAM - 0x10;
/// Where a guest has its image.
pub(super) const IMAGE_AT: u64 = 0x10_0000;

pub(super) type Answer = Result<Vec<u8>, RmError>;

pub(super) struct Full {
    pub(super) gunyah: Gunyah,
}

pub(super) fn acl(entries: &[(Vmid, u8)]) -> Vec<AclEntry> {
    entries.iter().map(|&(vmid, rights)| AclEntry { vmid, rights }).collect()
}

/// Pages by number.
pub(super) fn sgl(entries: &[(u64, u64)]) -> Vec<SglEntry> {
    entries.iter().map(|&(at, nr)| SglEntry { ipa: at * PAGE, size: nr * PAGE }).collect()
}

pub(super) fn lend(members: &[(Vmid, u8)], pages: &[(u64, u64)]) -> Create {
    Create {
        transfer: Transfer::Lend,
        mem_type: 0,
        flags: 0,
        label: 7,
        acl: acl(members),
        sgl: sgl(pages),
        attrs: Vec::new(),
    }
}

pub(super) fn share(members: &[(Vmid, u8)], pages: &[(u64, u64)]) -> Create {
    Create { transfer: Transfer::Share, ..lend(members, pages) }
}

pub(super) fn donate(to: Vmid, pages: &[(u64, u64)]) -> Create {
    Create { transfer: Transfer::Donate, ..lend(&[(to, 7)], pages) }
}

/// All of it, at once, wherever there is room.
pub(super) fn take(handle: u32, transfer: Transfer) -> Accept {
    Accept {
        handle,
        mem_type: 0,
        transfer: transfer as u8,
        flags: accept::DONE,
        label: 0,
        acl: Vec::new(),
        sgl: Vec::new(),
        map_vmid: Vmid(0),
        attrs: vec![],
    }
}

impl Full {
    pub(super) fn new() -> Self {
        Self::with(NR_HEAP, Fate::Lost)
    }

    pub(super) fn with(nr_heap: u64, fate: Fate) -> Self {
        Self::of(machine(nr_heap), fate, IMAGES)
    }

    /// On a machine that the specification is kept for.
    pub(super) fn small() -> Self {
        Self::of(machine_of(SMALL, NR_HEAP), Fate::Lost, RAM + SMALL - 0x10)
    }

    fn of(machine: Machine, fate: Fate, images: u64) -> Self {
        let gunyah = Gunyah::boot(machine, BbmLevel::Zero, fate).unwrap();
        let full = Self { gunyah };
        full.guest(A, images);
        full.guest(B, images + 1);
        full
    }

    /// A guest that runs, with one page.
    pub(super) fn guest(&self, vmid: Vmid, page: u64) -> u32 {
        let handle =
            self.create(HOST, &Create { label: 0, ..lend(&[(vmid, 7)], &[(page, 1)]) }).unwrap();
        let image = Image { handle, ipa: IMAGE_AT, unsanitized: true };
        self.gunyah.with(|World { hyp, rm, .. }| {
            assert_eq!(rm.allocate(HOST, vmid), Ok(vmid));
            rm.config_image(hyp, HOST, vmid, 2, image).unwrap();
            rm.init_vm(hyp, HOST, vmid).unwrap();
            rm.start_vm(HOST, vmid).unwrap();
        });
        handle
    }

    pub(super) fn send(&self, from: Vmid, request: &Request) -> Answer {
        let (id, body) = encode(request);
        let reply = self.gunyah.message(from, id, &body);
        let code = reply.error.map_or(0, |error| error as u32);
        assert!(reply.bytes().starts_with(&code.to_le_bytes()));
        match reply.error {
            None => Ok(reply.body),
            Some(error) => {
                assert_eq!(reply.body, []);
                Err(error)
            }
        }
    }

    /// A request that must be refused so, and change nothing.
    pub(super) fn refused(&self, from: Vmid, request: &Request, error: RmError) {
        let before = self.picture();
        assert_eq!(self.send(from, request), Err(error), "{request:x?}");
        let after = self.picture();
        assert_eq!(before.difference(&after), None, "{request:x?}");
        assert_eq!(before.heads, after.heads, "{request:x?}");
    }

    pub(super) fn create(&self, from: Vmid, create: &Create) -> Result<u32, RmError> {
        let body = self.send(from, &Request::Create(create.clone()))?;
        Ok(u32::from_le_bytes(body.try_into().unwrap()))
    }

    pub(super) fn accept(&self, from: Vmid, accept: &Accept) -> Answer {
        self.send(from, &Request::Accept(accept.clone()))
    }

    pub(super) fn release(&self, from: Vmid, handle: u32, flags: u8) -> Result<(), RmError> {
        self.send(from, &Request::Release { handle, flags }).map(|body| assert_eq!(body, []))
    }

    pub(super) fn reclaim(&self, from: Vmid, handle: u32, flags: u8) -> Result<(), RmError> {
        self.send(from, &Request::Reclaim { handle, flags }).map(|body| assert_eq!(body, []))
    }

    pub(super) fn picture(&self) -> Snapshot {
        self.gunyah.with(|world| Snapshot::of(world))
    }

    pub(super) fn parcel(&self, handle: u32) -> Parcel {
        self.gunyah.with(|world| world.rm.parcels[&handle].clone())
    }

    /// Where a VM's page leads, and what may be done there.
    pub(super) fn at(&self, vmid: Vmid, gfn: u64) -> Option<(u64, Access)> {
        self.gunyah.with(|world| {
            let home = world.rm.vms[&vmid].home?;
            let (pfn, leaf) = world.hyp.aspaces[&home.aspace].tree.translate(Gfn::new(gfn))?;
            Some((pfn.get(), Access::from(leaf.prot)))
        })
    }

    pub(super) fn store(&self, vmid: Vmid, gfn: u64, bytes: &[u8]) -> bool {
        self.gunyah.vcpu(vmid, Ipa::new(gfn * PAGE), Bytes::Store(bytes)).is_ok()
    }

    pub(super) fn load(&self, vmid: Vmid, gfn: u64) -> Option<[u8; 4]> {
        let mut buf = [0; 4];
        let answer = self.gunyah.vcpu(vmid, Ipa::new(gfn * PAGE), Bytes::Load(&mut buf));
        answer.ok().map(|()| buf)
    }

    /// Takes a VM apart, to the end.
    pub(super) fn reset(&self, vmid: Vmid) {
        self.gunyah.with(|World { hyp, rm, .. }| {
            rm.stop_vm(HOST, vmid).unwrap();
            rm.reset_vm(HOST, vmid).unwrap();
            while rm.reset_step(hyp, vmid).unwrap() {}
        });
    }

    pub(super) fn heard(&self, vmid: Vmid) -> Vec<Notification> {
        std::iter::from_fn(|| self.gunyah.hear(vmid)).collect()
    }

    pub(super) fn sound(&self) {
        self.gunyah.with(|world| assert_eq!(world.check(), [""; 0]));
    }
}

/// The first address of an answer to an accept.
pub(super) fn placed(answer: &[u8]) -> Vec<(u64, u64)> {
    let nr = u16::from_le_bytes([answer[0], answer[1]]);
    let entries = answer[4..].chunks_exact(16).map(|entry| {
        let word = |at| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap()) / PAGE;
        (word(0), word(8))
    });
    let entries: Vec<_> = entries.collect();
    assert_eq!(entries.len(), usize::from(nr));
    entries
}

pub(super) fn with_attrs(create: &Create, attrs: &[(u16, Vmid)]) -> Create {
    let attrs = attrs.iter().map(|&(attr, vmid)| AttrEntry { attr, vmid }).collect();
    Create { attrs, ..create.clone() }
}

pub(super) fn with_flags(create: &Create, flags: u8) -> Create {
    Create { flags, ..create.clone() }
}

pub(super) const SANITIZE: u8 = create::SANITIZE;
