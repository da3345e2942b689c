//! The structure that a vCPU shares with KVM.

// UNSAFETY: memory that the kernel writes.
#![expect(unsafe_code, reason = "memory shared with the kernel")]

use std::os::fd::OwnedFd;

use pkvm_oracle::Errno;

use crate::sys;

// Offsets in struct kvm_run.
const EXIT_REASON: usize = 8;
const MMIO_IPA: usize = 32;
const MMIO_DATA: usize = 40;
const MMIO_LEN: usize = 48;
const MMIO_IS_WRITE: usize = 52;
/// What is read of it.
const BYTES: usize = 56;

const EXIT_MMIO: u32 = 6;

#[derive(Debug)]
pub(crate) struct RunPage {
    at: *mut u8,
    bytes: usize,
}

/// An access that left the guest.
pub(crate) struct Mmio {
    pub(crate) ipa: u64,
    /// The value, if it is a store.
    pub(crate) stored: Option<u64>,
}

impl RunPage {
    pub(crate) fn map(vcpu: &OwnedFd, bytes: usize) -> Result<Self, Errno> {
        if bytes < BYTES {
            return Err(Errno(libc::EINVAL));
        }
        let at = sys::map(bytes, libc::MAP_SHARED, Some(vcpu))?;
        Ok(Self { at, bytes })
    }

    pub(crate) fn unmap(self) {
        // Nothing can be done about a failure, which there is no reason for.
        let _: Result<(), Errno> = sys::unmap(self.at, self.bytes);
    }

    pub(crate) fn reason(&self) -> u32 {
        self.word(EXIT_REASON)
    }

    pub(crate) fn mmio(&self) -> Option<Mmio> {
        if self.reason() != EXIT_MMIO {
            return None;
        }
        let len = self.word(MMIO_LEN);
        let is_store = self.word(MMIO_IS_WRITE) & 0xff != 0;
        let value = self.double(MMIO_DATA);
        let kept = if len >= 8 { value } else { value & ((1 << (len * 8)) - 1) };
        Some(Mmio { ipa: self.double(MMIO_IPA), stored: is_store.then_some(kept) })
    }

    /// What the guest's load gets, when it goes on.
    pub(crate) fn answer_load(&self, value: u64) {
        let at: *mut u64 = self.at.wrapping_add(MMIO_DATA).cast();
        // SAFETY: within the mapping (`map`), aligned; the vCPU does not run, so the kernel does
        // not touch it; no reference to it is ever made.
        unsafe { at.write_volatile(value) };
    }

    fn word(&self, offset: usize) -> u32 {
        let at: *const u32 = self.at.wrapping_add(offset).cast();
        // SAFETY: as in `answer_load`.
        unsafe { at.read_volatile() }
    }

    fn double(&self, offset: usize) -> u64 {
        let at: *const u64 = self.at.wrapping_add(offset).cast();
        // SAFETY: as in `answer_load`.
        unsafe { at.read_volatile() }
    }
}
