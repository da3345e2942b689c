//! A vCPU with its VMM behind it: whatever exits is dealt with, and the guest goes on.
//!
//! In a real VMM this is the run loop. Here the guest is code that calls its vCPU, so an exit comes
//! back as the error of a load, a store or a hypercall, and is handled right there.

use std::sync::Arc;
use std::time::Duration;

use gmem::addr::Ipa;
use gmem::hyp::{Exit, Hypercall, MmioAccess, Vcpu};

use crate::Fallible;
use crate::board::Board;
use crate::layout::board;

/// The bits for these calls in what a hypervisor says it has: the unit of sharing, to share, to take back.
const SHARING: u64 = 1 << 2 | 1 << 3 | 1 << 4;

/// What the guest's code holds.
#[derive(Debug)]
pub(crate) struct Cpu {
    vcpu: Vcpu,
    board: Arc<Board>,
    /// How long the guest has been waiting for another vCPU.
    spins: u32,
}

impl Cpu {
    pub(crate) fn new(vcpu: Vcpu, board: Arc<Board>) -> Self {
        Self { vcpu, board, spins: 0 }
    }

    /// Loads bytes of guest memory.
    pub(crate) fn load(&mut self, at: u64, buf: &mut [u8]) -> Fallible<()> {
        self.vcpu.load(Ipa::new(at), buf).map_err(stuck)
    }

    /// Stores bytes in guest memory.
    pub(crate) fn store(&mut self, at: u64, data: &[u8]) -> Fallible<()> {
        self.vcpu.store(Ipa::new(at), data).map_err(stuck)
    }

    /// An atomic load from guest memory.
    pub(crate) fn load_u64(&mut self, at: u64) -> Fallible<u64> {
        self.vcpu.load_u64(Ipa::new(at)).map_err(stuck)
    }

    /// An atomic store to guest memory.
    pub(crate) fn store_u64(&mut self, at: u64, value: u64) -> Fallible<()> {
        // Whoever stores does not wait.
        self.spins = 0;
        self.vcpu.store_u64(Ipa::new(at), value).map_err(stuck)
    }

    /// An atomic compare-and-exchange in guest memory; returns what was there.
    pub(crate) fn compare_exchange_u64(&mut self, at: u64, old: u64, new: u64) -> Fallible<u64> {
        let found = self.vcpu.compare_exchange_u64(Ipa::new(at), old, new).map_err(stuck)?;
        Ok(found.unwrap_or_else(|found| found))
    }

    /// A load from a register.
    pub(crate) fn load_u32(&mut self, at: u64) -> Fallible<u32> {
        let mut raw = [0; 4];
        match self.vcpu.load(Ipa::new(at), &mut raw) {
            Ok(()) => Ok(u32::from_le_bytes(raw)),
            Err(Exit::Mmio { ipa, access: MmioAccess::Read(size) }) if size.get() == 4 => {
                self.board.run.check()?;
                Ok(self.board.read(ipa.get()))
            }
            Err(exit) => Err(stuck(exit)),
        }
    }

    /// A store to a register.
    pub(crate) fn store_u32(&mut self, at: u64, value: u32) -> Fallible<()> {
        match self.vcpu.store(Ipa::new(at), &value.to_le_bytes()) {
            Ok(()) => Ok(()),
            Err(Exit::Mmio { ipa, access: MmioAccess::Write(data) }) => {
                self.board.run.check()?;
                match data.try_into() {
                    Ok(raw) => self.board.write(ipa.get(), u32::from_le_bytes(raw)),
                    Err(_) => Err(format!("a register at {ipa} has 32 bits").into()),
                }
            }
            Err(exit) => Err(stuck(exit)),
        }
    }

    /// Whether memory is the guest's own until it is shared. A guest that is not protected finds no call to share
    /// any: the host sees all of it anyway.
    pub(crate) fn has_private_memory(&mut self) -> Fallible<bool> {
        let features = self.vcpu.hvc(Hypercall::Features).map_err(stuck)?;
        Ok(features.regs().0[0] & SHARING == SHARING)
    }

    /// Lets the host see a page. It is cleared first: what was in it is not the host's business.
    pub(crate) fn share_page(&mut self, at: u64) -> Fallible<()> {
        self.store(at, &[0; 4096])?;
        self.hypercall(Hypercall::MemShare(Ipa::new(at)))
    }

    /// Takes a page back from the host.
    pub(crate) fn unshare_page(&mut self, at: u64) -> Fallible<()> {
        self.hypercall(Hypercall::MemUnshare(Ipa::new(at)))
    }

    fn hypercall(&mut self, call: Hypercall) -> Fallible<()> {
        let result = match self.vcpu.hvc(call) {
            Ok(result) => result,
            Err(Exit::Conversion(request)) => {
                self.board.convert(&request);
                // The hypervisor looks for itself whether that was done.
                self.vcpu.answer()?
            }
            Err(exit) => return Err(stuck(exit)),
        };
        self.board.run.beat();
        match result {
            done if done.is_success() => Ok(()),
            refused => Err(format!("{call:x?} was refused: {:#x?}", refused.regs()).into()),
        }
    }

    /// Prints a line on the guest's console.
    pub(crate) fn print(&mut self, line: &str) -> Fallible<()> {
        for byte in line.bytes().chain([b'\n']) {
            self.store_u32(board::CONSOLE, byte.into())?;
        }
        Ok(())
    }

    /// What a guest does while it waits for another vCPU (WFE); an error if the machine is stopped.
    pub(crate) fn relax(&mut self) -> Fallible<()> {
        self.board.run.check()?;
        self.spins = self.spins.saturating_add(1);
        match self.spins {
            0..=200 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
        Ok(())
    }
}

/// An exit that this VMM has no answer to.
fn stuck(exit: Exit) -> Box<dyn std::error::Error + Send + Sync> {
    format!("the guest cannot go on: {exit}").into()
}
