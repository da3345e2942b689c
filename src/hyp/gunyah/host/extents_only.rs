//! Memory that changes hands between a host and a VM, on machines whose frames have no bytes; and who has a frame, in
//! a machine of any size. For benches.

use std::sync::Arc;

use super::Guest;
use super::calls::message;
use super::given::Side;
use super::life::{lend, with_flags};
use super::provide::Contents;
use crate::addr::{ByteSize, Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::hyp::gunyah::memdb::{ExtentId, Memdb, Owner};
use crate::hyp::gunyah::rm::accept::DONE;
use crate::hyp::gunyah::rm::message::{ACCEPT, LEND, RECLAIM, RELEASE, Transfer};
use crate::hyp::gunyah::rm::{Vmid, release};
use crate::hyp::gunyah::{Gunyah, World};
use crate::range::{GfnRange, PfnRange};
use crate::stage2::GuestRun;

/// A host and a VM that runs.
#[derive(Debug)]
pub struct ExtentsOnly {
    gunyah: Arc<Gunyah>,
    guest: Guest,
    vmid: Vmid,
}

fn accept(handle: u32, at: GfnRange) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    // Memory that is lent, all of it at once; no label; no list to be checked; one place.
    body.extend([0, Transfer::Lend as u8, DONE, 0]);
    body.extend([0; 8]);
    body.extend([1, 0, 0, 0]);
    body.extend(at.start().ipa().get().to_le_bytes());
    body.extend(at.len_bytes().get().to_le_bytes());
    body
}

impl ExtentsOnly {
    /// A machine with so much memory, which is all the host's.
    ///
    /// # Errors
    /// `EINVAL`, `ENOMEM`.
    pub fn boot(memory: ByteSize) -> Result<Self, Errno> {
        let nr_pages = memory.get() / ByteSize::from_pages(1).get();
        let gunyah = Arc::new(Gunyah::on_machine(nr_pages, None)?);
        let guest = Guest::create(&gunyah)?;
        let vmid = guest.vmid().ok_or(Errno::ENODEV)?;
        Ok(Self { gunyah, guest, vmid })
    }

    /// Four messages: the host lends frames, the VM accepts and releases them, and the host reclaims them, cleared.
    ///
    /// # Errors
    /// The first that is refused.
    pub fn lend_and_reclaim(&mut self, frames: PfnRange, at: Gfn) -> Result<(), Errno> {
        let at = GfnRange::new(at, frames.nr_pages()).map_err(|error| error.errno())?;
        let (host, vmid) = (Vmid::HLOS, self.vmid);
        let send = |from, id, body: &[u8]| {
            self.gunyah.with(|world: &mut World| message(world, from, id, body))
        };
        let handle = send(host, LEND, &lend(vmid, frames))?;
        let handle = u32::from_le_bytes(handle.try_into().map_err(|_| Errno::EIO)?);
        send(vmid, ACCEPT, &accept(handle, at))?;
        send(vmid, RELEASE, &with_flags(handle, 0))?;
        send(host, RECLAIM, &with_flags(handle, release::SANITIZE)).map(drop)
    }

    /// As the host's kernel does it on demand: provides a folio, and takes it back.
    ///
    /// # Errors
    /// As [`Guest::provide`] and [`Guest::reclaim`].
    pub fn provide_and_reclaim(&mut self, frames: PfnRange, at: Gfn) -> Result<(), Errno> {
        let run = GuestRun { gfn: at, pfn: frames.start(), nr_pages: frames.nr_pages() };
        self.guest.provide(&[run], Side::Lent, true, &mut || ())?;
        self.guest.reclaim(&[run], Contents::Clear)
    }

    /// Everything that is wrong.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = self.gunyah.check();
        wrong.extend(self.guest.check());
        wrong
    }
}

/// Who has a frame: a machine in which one page of some blocks of 2 MiB is somebody else's, so that these blocks are
/// known page by page.
#[derive(Debug)]
pub struct OwnersOnly(Memdb);

impl OwnersOnly {
    /// # Errors
    /// `EINVAL` for blocks that the machine has not, or twice.
    pub fn new(memory: PfnRange, blocks: impl Iterator<Item = Pfn>) -> Result<Self, Errno> {
        let mut memdb = Memdb::new();
        memdb.insert(memory, Owner::Partition)?;
        for block in blocks {
            let one = PfnRange::single(Pfn::new(block.get() + HUGE_PAGES / 2));
            let one = one.map_err(|error| error.errno())?;
            memdb.update(one, Owner::Extent(ExtentId(0)), Owner::Partition)?;
        }
        Ok(Self(memdb))
    }

    /// Whether a frame is in an extent.
    #[inline]
    pub fn is_of_extent(&self, pfn: Pfn) -> bool {
        matches!(self.0.owner(pfn), Owner::Extent(_))
    }
}
