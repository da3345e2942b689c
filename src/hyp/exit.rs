//! Why a vCPU stopped, and what its VMM can do about it.

use super::hypercall::Registers;
use crate::addr::{Access, ByteSize, Ipa};
use crate::error::Error;
use crate::gmem::{ContentPolicy, Conversion, GuestMemfd};
use crate::range::{GfnRange, PgoffRange};
use crate::state::Visibility;

/// Why a vCPU stopped. When the VMM has dealt with it, the guest does again what it was doing.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Exit {
    /// The guest touched memory that is not on the side where it expects it; like
    /// `KVM_EXIT_MEMORY_FAULT`. The VMM may convert the page and let the guest go on.
    #[error("{access:?} of {size} bytes at {ipa}: {expected} memory expected")]
    MemoryFault {
        /// The first byte of the access that lies in the page.
        ipa: Ipa,
        /// How many bytes of the access lie in the page.
        size: ByteSize,
        /// Whether the guest was writing.
        access: Access,
        /// What the guest expects the memory to be.
        expected: Visibility,
    },
    /// The guest touched an address that no memslot covers; the VMM emulates what is there.
    #[error("MMIO at {ipa}: {access:?}")]
    Mmio {
        /// The first byte.
        ipa: Ipa,
        /// What the guest does there.
        access: MmioAccess,
    },
    /// The guest asks for memory to change sides, and waits. The VMM converts it or does not; then
    /// [`Vcpu::answer`](super::Vcpu::answer) tells the guest what became of it.
    #[error("the guest asks for {gfns} to be {to}", gfns = .0.gfns, to = .0.to)]
    Conversion(ConversionRequest),
    /// A hypercall that the hypervisor does not know. What the guest gets is up to the VMM.
    #[error("unknown hypercall {regs:?}")]
    Hypercall {
        /// What the guest asks for.
        regs: Registers,
    },
    /// The page was the guest's own, and the host destroyed it: it touched the bytes without asking anybody, and
    /// took the page by force. The guest gets nothing there any more, whatever the VMM does.
    #[error("the page at {ipa} was destroyed by the host")]
    Poisoned {
        /// The first byte of the access that lies in the page.
        ipa: Ipa,
    },
    /// The access cannot be done: an unaligned atomic, memory that is quarantined, and so on.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// What a guest does at an address without memory. Never more than to the end of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MmioAccess {
    /// It wants that many bytes.
    Read(ByteSize),
    /// It writes these.
    Write(Vec<u8>),
    /// It makes an atomic access of that size, which devices do not answer.
    Atomic(ByteSize),
}

/// Memory that a guest wants on the other side.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConversionRequest {
    /// The guest frames, as the guest named them.
    pub gfns: GfnRange,
    /// The object behind them.
    pub memfd: GuestMemfd,
    /// Their pages in it.
    pub pages: PgoffRange,
    /// Where the guest wants them.
    pub to: Visibility,
}

impl ConversionRequest {
    /// Does what the guest asks, bytes preserved.
    ///
    /// # Errors
    /// Those of [`GuestMemfd::convert`], above all [`Busy`](crate::error::ErrorKind::Busy) while
    /// somebody has the memory pinned. The VMM may try again before it answers.
    pub fn convert(&self) -> Result<Conversion, Error> {
        self.memfd.convert(self.pages, self.to, ContentPolicy::Preserve)
    }
}
