//! The machine's CPUs: on which one a vCPU is loaded.
//!
//! A CPU is taken for one call to EL2 or a few, by whoever holds its lock; meanwhile nobody calls an object. What
//! it has loaded stays loaded until another one needs it.

use crate::hyp::el2::{El2, HostCall};
use crate::hyp::order::{Kind, hold};
use crate::sync::{Mutex, MutexGuard};

/// How many the machine has. To ask how many there are here would take system calls that a VMM has shut off.
const NR_CPUS: usize = 16;

/// A vCPU, by the numbers that EL2 has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::hyp) struct Resident {
    pub(in crate::hyp) handle: u64,
    pub(in crate::hyp) idx: u64,
}

/// On which CPU a vCPU was last. It is loaded there or nowhere.
#[derive(Clone, Copy, Debug)]
pub(in crate::hyp) struct LastCpu(usize);

/// All CPUs, and which vCPU each has loaded.
#[derive(Debug)]
pub(super) struct Cpus(Box<[Mutex<Option<Resident>>]>);

type Cpu<'a> = MutexGuard<'a, Option<Resident>>;

impl Cpus {
    pub(super) fn new() -> Self {
        Self((0..NR_CPUS).map(|_| Mutex::new(None)).collect())
    }

    pub(super) fn nr(&self) -> usize {
        self.0.len()
    }

    /// Where the `nth` vCPU of all is to begin.
    pub(super) fn first_for(&self, nth: u64) -> LastCpu {
        LastCpu(crate::geometry::index(nth % self.nr() as u64))
    }

    /// Does something with a vCPU loaded.
    pub(super) fn with<T>(
        &self,
        el2: &El2,
        last: &mut LastCpu,
        who: Resident,
        act: impl FnOnce(usize) -> T,
    ) -> T {
        let _held = hold(Kind::Cpu);
        let mut cpu = self.0[last.0].lock();
        if *cpu != Some(who) {
            if cpu.is_some() {
                // Rather one that nobody uses than one after the other here.
                if let Some((other, idle)) = self.idle() {
                    (last.0, cpu) = (other, idle);
                }
            }
            load(el2, last.0, &mut cpu, who);
        }
        act(last.0)
    }

    /// A CPU that has nothing loaded. Whoever looks has one locked, so none is waited for.
    fn idle(&self) -> Option<(usize, Cpu<'_>)> {
        let mut cpus = self.0.iter().enumerate();
        cpus.find_map(|(nr, cpu)| cpu.try_lock().filter(|cpu| cpu.is_none()).map(|cpu| (nr, cpu)))
    }

    /// Puts every vCPU back of whom that is said.
    pub(super) fn put(&self, el2: &El2, whom: impl Fn(Resident) -> bool) {
        for (nr, cpu) in self.0.iter().enumerate() {
            let _held = hold(Kind::Cpu);
            let mut cpu = cpu.lock();
            if cpu.is_some_and(&whom) {
                let _ = el2.call(nr, HostCall::VcpuPut, [0; 4]);
                *cpu = None;
            }
        }
    }
}

fn load(el2: &El2, nr: usize, cpu: &mut Cpu<'_>, who: Resident) {
    // Neither of them says anything.
    if cpu.take().is_some() {
        let _ = el2.call(nr, HostCall::VcpuPut, [0; 4]);
    }
    let _ = el2.call(nr, HostCall::VcpuLoad, [who.handle, who.idx, 0, 0]);
    **cpu = Some(who);
}
