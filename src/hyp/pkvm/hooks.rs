//! What an object asks of the hypervisor, made of EL2's hypercalls. A call looks at all of its pages first, takes what
//! memory it may need, and then acts, all with the guest's lock held for writing: nothing changes in between.

use super::plan::{Plan, Step, Terms};
use super::vm::VmCore;
use crate::addr::Gfn;
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::hyp::el2::{El2, GuestAnswer, HostCall, Mapped};
use crate::hyp::hypercall::{MEM_SHARE, MEM_UNSHARE};
use crate::hyp::vm::{Life, VmKind, VmState};
use crate::stage2::{Faulted, GuestMove, GuestRun, Prevented, Stage2};
use crate::state::Visibility;

/// KVM's bits for all rights.
const PROT_RWX: u64 = 0b111;

impl VmCore {
    fn convert(
        &self,
        state: &VmState,
        runs: &[GuestRun],
        to: Visibility,
        prepare: &mut dyn FnMut(),
    ) -> Result<(), Errno> {
        let terms = Terms {
            is_alive: state.life == Life::Alive,
            to,
            consents: &|gfn| state.consents(gfn, to),
        };
        let plan = Plan::new(self, runs, &terms)?;
        if !plan.parts.is_empty() {
            self.top_up(plan.nr_tables)?;
        }
        match plan.is_reached {
            true => {
                self.with_guest_stopped(runs.iter().map(|run| (run.gfn, run.nr_pages)), prepare)
            }
            false => prepare(),
        }
        for &(run, step) in &plan.parts {
            let mut at = 0;
            while at < run.nr_pages {
                let (gfn, pfn) = (run.gfn.get() + at, run.pfn.get() + at);
                // To the end of what one block could be: then others may have the CPU.
                let nr_pages = (HUGE_PAGES - gfn % HUGE_PAGES).min(run.nr_pages - at);
                let by_block = nr_pages == HUGE_PAGES
                    && pfn % HUGE_PAGES == 0
                    && self.host.profile.donates(HUGE_PAGES)
                    && state.is_huge(run.gfn);
                let made = self.on_loader(|el2, cpu| match step {
                    Step::Donate if by_block => {
                        el2.call(cpu, HostCall::DonateGuest, [pfn, gfn, HUGE_PAGES, 0]).map(drop)
                    }
                    _ => (0..nr_pages)
                        .try_for_each(|nth| make(el2, cpu, step, Gfn::new(gfn + nth), pfn + nth)),
                });
                // All was looked at, and nobody came in between.
                debug_assert_eq!(made, Ok(()), "EL2 refuses {step:?} of {run:?} half way");
                made.map_err(|_| Errno::EIO)?;
                at += nr_pages;
            }
        }
        Ok(())
    }

    /// Splits the block around a page of a guest's.
    pub(super) fn split(&self, gfn: Gfn) -> Result<(), Errno> {
        self.top_up(1)?;
        self.on_loader(|el2, cpu| split(el2, cpu, gfn))
    }

    /// What guests have of some runs: each leaf once.
    fn leaves_in(&self, runs: impl Iterator<Item = GuestRun>) -> Vec<Mapped> {
        let look = self.look();
        let mut leaves: Vec<Mapped> = Vec::new();
        for run in runs {
            let mut nth = 0;
            while nth < run.nr_pages {
                let gfn = Gfn::new(run.gfn.get() + nth);
                nth += 1;
                let Ok(leaf) = look.guest(gfn) else { continue };
                let skip = gfn.get() - leaf.start.get();
                // A block is left behind at once.
                nth += leaf.nr_pages - 1 - skip;
                if leaves.last().is_none_or(|last| last.start != leaf.start) {
                    let pfn = crate::addr::Pfn::new(leaf.pfn.get() - skip);
                    leaves.push(Mapped { pfn, ..leaf });
                }
            }
        }
        leaves
    }

    fn hide(&self, runs: impl Iterator<Item = GuestRun>) -> Result<(), Errno> {
        self.leaves_in(runs).iter().try_for_each(|leaf| self.take_back(leaf))
    }

    /// Shows a guest that is not protected a page of the host's, or the 2 MiB around it.
    fn show(
        &self,
        state: &VmState,
        page: GuestRun,
        block: Option<GuestRun>,
    ) -> Result<Faulted, Errno> {
        if state.life != Life::Alive {
            return Err(Errno::EINVAL);
        }
        let run = {
            let look = self.look();
            if look.guest(page.gfn).is_ok() {
                // Another vCPU was faster.
                return Ok(Faulted::Mapped);
            }
            block.filter(|block| look.is_vacant_block(block.gfn)).unwrap_or(page)
        };
        self.top_up(2)?;
        let x = [run.pfn.get(), run.gfn.get(), run.nr_pages, PROT_RWX];
        self.on_loader(|el2, cpu| el2.call(cpu, HostCall::ShareGuest, x))?;
        Ok(Faulted::Mapped)
    }
}

/// Makes a step that was found to be possible.
fn make(el2: &El2, cpu: usize, step: Step, gfn: Gfn, pfn: u64) -> Result<(), Errno> {
    match step {
        Step::Nothing => Ok(()),
        Step::Donate => el2.call(cpu, HostCall::DonateGuest, [pfn, gfn.get(), 1, 0]).map(drop),
        Step::Share => ask(el2, cpu, MEM_SHARE, gfn),
        Step::Unshare => ask(el2, cpu, MEM_UNSHARE, gfn),
    }
}

/// The guest's hypercall for one page, to which the VMM has agreed.
fn ask(el2: &El2, cpu: usize, call: u64, gfn: Gfn) -> Result<(), Errno> {
    let mut split_once = false;
    loop {
        match el2.guest_call(cpu, [call, gfn.ipa().get(), 0, 0])? {
            GuestAnswer::Resume([0, ..]) => return Ok(()),
            GuestAnswer::WantsSplit(_) if !split_once => {
                split(el2, cpu, gfn)?;
                split_once = true;
            }
            _ => return Err(Errno::EPERM),
        }
    }
}

fn split(el2: &El2, cpu: usize, gfn: Gfn) -> Result<(), Errno> {
    let start = gfn.get() - gfn.get() % HUGE_PAGES;
    el2.call(cpu, HostCall::SplitGuest, [start, HUGE_PAGES, 0, 0]).map(drop)
}

impl Stage2 for VmCore {
    fn make_private(&self, runs: &[GuestRun], prepare: &mut dyn FnMut()) -> Result<(), Errno> {
        match self.kind() {
            VmKind::Protected => {
                self.convert(&self.book.state.write(), runs, Visibility::Private, prepare)
            }
            VmKind::NonProtected => Err(Errno::EOPNOTSUPP),
        }
    }

    fn make_shared(&self, runs: &[GuestRun], prepare: &mut dyn FnMut()) -> Result<(), Errno> {
        let state = self.book.state.write();
        match self.kind() {
            VmKind::Protected => self.convert(&state, runs, Visibility::Shared, prepare),
            VmKind::NonProtected => {
                prepare();
                Ok(())
            }
        }
    }

    fn fault(
        &self,
        side: Visibility,
        page: GuestRun,
        block: Option<GuestRun>,
    ) -> Result<Faulted, Errno> {
        let state = self.book.state.write();
        match (self.kind(), side) {
            (VmKind::NonProtected, Visibility::Shared) => self.show(&state, page, block),
            (VmKind::Protected, Visibility::Private) => {
                if self.look().guest(page.gfn) == Err(Errno::EHWPOISON) {
                    // Destroyed since the guest touched it. When it looks again it finds that.
                    return Ok(Faulted::Mapped);
                }
                let block = block.filter(|block| {
                    self.host.profile.donates(HUGE_PAGES) && self.look().is_vacant_block(block.gfn)
                });
                let run = block.unwrap_or(page);
                self.convert(&state, &[run], side, &mut || ())?;
                Ok(Faulted::Mapped)
            }
            _ => Ok(Faulted::OtherSide),
        }
    }

    fn has_private(&self) -> bool {
        self.kind() == VmKind::Protected
    }

    fn note_prevented(&self, what: Prevented) {
        self.book.prevented.note(what);
    }

    /// A protected guest maps no page that is not its own, and what it owns nobody takes out of its table while it
    /// lives.
    fn invalidate_range(&self, runs: &[GuestRun]) {
        if self.kind() == VmKind::NonProtected {
            let _state = self.book.state.write();
            let hidden = self.hide(runs.iter().copied());
            debug_assert_eq!(hidden, Ok(()), "what is shown can be hidden");
        }
    }

    fn reclaim(&self, runs: &[GuestRun]) -> Result<(), Errno> {
        if self.kind() == VmKind::NonProtected {
            return Ok(());
        }
        let state = self.book.state.write();
        {
            let look = self.look();
            runs.iter().try_for_each(|run| look.check_memory(run.pfn, run.nr_pages))?;
        }
        let leaves = self.leaves_in(runs.iter().copied());
        match state.life {
            Life::Alive if !leaves.is_empty() => Err(Errno::EBUSY),
            _ => leaves.iter().try_for_each(|leaf| self.take_back(leaf)),
        }
    }

    /// What a protected guest has been given, or shares, stays where it is: pKVM has no hypercall that would move such a
    /// page. What another is shown is hidden, and it faults on the new frames.
    fn migrate(&self, moves: &[GuestMove], copy: &mut dyn FnMut()) -> Result<(), Errno> {
        let _state = self.book.state.write();
        {
            let look = self.look();
            moves.iter().try_for_each(|it| look.check_memory(it.from.pfn, it.from.nr_pages))?;
        }
        let from = moves.iter().map(|one| one.from);
        match self.kind() {
            VmKind::Protected if !self.leaves_in(from.clone()).is_empty() => Err(Errno::EPERM),
            VmKind::Protected => {
                copy();
                Ok(())
            }
            VmKind::NonProtected => {
                self.hide(from)?;
                copy();
                Ok(())
            }
        }
    }
}
