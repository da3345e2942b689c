//! The host as it is without this library: whatever it touches, it touches by itself.
//!
//! A VMM that uses pointers of its own, a kernel that copies through its linear map, a device behind no IOMMU: none of
//! them asks the object. Here they meet the hypervisor, and what becomes of that is what a real machine shows.

use super::el2::Bytes;
use super::hypervisor::Hypervisor;
use crate::addr::{Offset, Pa, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{PAGE_SIZE, index};
use crate::gmem::GuestMemfd;

/// The host's bare hands: accesses to an object's bytes that ask neither the object nor anybody else.
///
/// It is there to show what happens then, and to test that nothing worse does. The object's own rules do not see it: a
/// page may be pinned, private or being converted.
#[derive(Clone, Debug)]
pub struct RawHost(pub(super) Hypervisor);

/// By which way the host reaches for a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RawPath {
    /// A load or store of user space, through a mapping of its own.
    User,
    /// The kernel copies by an address of user space, and expects that to fail at times: `read(2)`, `write(2)`.
    Uaccess,
    /// The kernel uses a pointer of its own, which is never to fail: `process_vm_readv(2)`, `O_DIRECT` to a ramdisk,
    /// `splice(2)`.
    KernelAlias,
    /// A device.
    Dma,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RawOutcome {
    /// The bytes were read or written.
    Done,
    /// They were, but first a page that a guest had to itself was taken by force: what was in it is lost, and the
    /// guest's next access exits with [`Poisoned`](crate::hyp::Exit::Poisoned).
    Destroyed,
    /// User space got `SIGSEGV` with `SEGV_ACCERR`.
    Sigsegv,
    /// User space got `SIGBUS`.
    Sigbus,
    /// The copy failed with `EFAULT`.
    Efault,
    /// The kernel stopped.
    Oops,
    /// The kernel waits for ever.
    Stuck,
    /// The IOMMU stopped the device, or the memory is broken. [`Model::answer_to_stray`](super::Model::answer_to_stray)
    /// says where that is so.
    DmaFault,
}

impl RawHost {
    /// Reads bytes of an object. Ends at the first page that does not answer.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an object of another pool; [`ErrorKind::OutOfRange`];
    /// [`ErrorKind::NotFound`] where the object has no memory.
    pub fn load(
        &self,
        by: RawPath,
        memfd: &GuestMemfd,
        at: Offset,
        buf: &mut [u8],
    ) -> Result<RawOutcome, Error> {
        let mut rest = buf;
        let (mut at, mut sum) = (at, RawOutcome::Done);
        while !rest.is_empty() {
            let (now, later) = rest.split_at_mut(left_in_page(at).min(rest.len()));
            let size = now.len();
            match self.touch(by, memfd, at, Bytes::Load(now))? {
                RawOutcome::Done => {}
                RawOutcome::Destroyed => sum = RawOutcome::Destroyed,
                other => return Ok(other),
            }
            (at, rest) = (behind(at, size)?, later);
        }
        Ok(sum)
    }

    /// Writes bytes of an object. Ends at the first page that does not answer.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn store(
        &self,
        by: RawPath,
        memfd: &GuestMemfd,
        at: Offset,
        data: &[u8],
    ) -> Result<RawOutcome, Error> {
        let mut rest = data;
        let (mut at, mut sum) = (at, RawOutcome::Done);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(left_in_page(at).min(rest.len()));
            match self.touch(by, memfd, at, Bytes::Store(now))? {
                RawOutcome::Done => {}
                RawOutcome::Destroyed => sum = RawOutcome::Destroyed,
                other => return Ok(other),
            }
            (at, rest) = (behind(at, now.len())?, later);
        }
        Ok(sum)
    }

    fn touch(
        &self,
        by: RawPath,
        memfd: &GuestMemfd,
        at: Offset,
        bytes: Bytes<'_>,
    ) -> Result<RawOutcome, Error> {
        let host = &*self.0.0;
        let error = |kind| Error::new(Op::Hypervisor, kind);
        if !std::sync::Arc::ptr_eq(memfd.pool().arena(), &host.arena) {
            return Err(error(ErrorKind::Unsupported).because("the object is of another pool"));
        }
        let page: Pgoff = at.pgoff();
        // The page stays where it is meanwhile, so that nobody else's is touched; and what a conversion has found at
        // the hypervisor it still finds when it acts.
        memfd.with_frame(page, |pfn| {
            let pfn = pfn.ok_or_else(|| error(ErrorKind::NotFound).because("no memory there"))?;
            let at = Pa::new(pfn.pa().get() + at.in_page().get());
            Ok(host.monitor.touch(by, at, bytes))
        })?
    }
}

fn left_in_page(at: Offset) -> usize {
    index(PAGE_SIZE.get() - at.in_page().get())
}

fn behind(at: Offset, size: usize) -> Result<Offset, Error> {
    let size = crate::addr::ByteSize::from_bytes(size as u64);
    at.checked_add(size).ok_or_else(|| Error::new(Op::Hypervisor, ErrorKind::OutOfRange))
}
