//! Who makes a call: a CPU by its number, which is locked for as long as the call needs it; or a thread that is a CPU
//! for a while, as a real CPU is always, and pays for that once.

use super::El2;
#[cfg(any(test, feature = "oracle"))]
use super::guest_call::GuestAnswer;
use super::vm::{Cpu, Loaded};
use crate::error::Errno;

/// A CPU, as a call knows it.
#[derive(Debug)]
pub(crate) enum OnCpu<'a> {
    Number(usize),
    #[cfg_attr(
        not(any(test, feature = "oracle")),
        expect(dead_code, reason = "hyp/pkvm calls by number")
    )]
    Entered {
        nr: usize,
        cpu: &'a mut Cpu,
    },
}

/// A CPU that a thread is. Its lock is the first of all, so nothing else may be locked by who enters.
#[cfg(any(test, feature = "oracle"))]
#[derive(Debug)]
pub(crate) struct EnteredCpu<'a> {
    el2: &'a El2,
    nr: usize,
    cpu: crate::sync::SpinGuard<'a, Cpu>,
}

#[cfg(any(test, feature = "oracle"))]
impl EnteredCpu<'_> {
    /// As [`El2::host_call`].
    #[inline]
    pub(crate) fn host_call(&mut self, x: [u64; 5]) -> [u64; 2] {
        self.el2.host_call_on(&mut OnCpu::Entered { nr: self.nr, cpu: &mut self.cpu }, x)
    }

    /// As [`El2::guest_call`].
    ///
    /// # Errors
    /// The same.
    #[inline]
    pub(crate) fn guest_call(&mut self, x: [u64; 4]) -> Result<GuestAnswer, Errno> {
        self.el2.guest_call_on(&mut OnCpu::Entered { nr: self.nr, cpu: &mut self.cpu }, x)
    }
}

impl El2 {
    /// The calling thread is this CPU until it drops what it gets. `None` for a CPU that the machine has not.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn enter(&self, nr: usize) -> Option<EnteredCpu<'_>> {
        Some(EnteredCpu { el2: self, nr, cpu: self.cpu(nr)? })
    }

    /// Does something with the CPU and its number.
    ///
    /// # Errors
    /// `EINVAL` for a CPU that the machine has not; what `act` says.
    #[inline]
    pub(super) fn with_cpu<T>(
        &self,
        on: &mut OnCpu<'_>,
        act: impl FnOnce(&mut Cpu, usize) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut locked;
        // One place where it acts, which can then be inlined.
        let (cpu, nr): (&mut Cpu, _) = match on {
            OnCpu::Number(nr) => {
                locked = self.cpu(*nr).ok_or(Errno::EINVAL)?;
                (&mut *locked, *nr)
            }
            OnCpu::Entered { nr, cpu } => (&mut **cpu, *nr),
        };
        act(cpu, nr)
    }

    /// Does something with the vCPU that a CPU has loaded.
    ///
    /// # Errors
    /// `EINVAL` if it has none; what `act` says.
    #[inline]
    pub(super) fn with_vcpu_on<T>(
        &self,
        on: &mut OnCpu<'_>,
        act: impl FnOnce(&mut Loaded) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.with_cpu(on, |cpu, _| act(cpu.loaded.as_mut().ok_or(Errno::EINVAL)?))
    }
}
