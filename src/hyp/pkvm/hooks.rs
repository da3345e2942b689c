//! What an object asks of the hypervisor, made of EL2's hypercalls. A call looks at all of its pages first, takes what
//! memory it may need, and then acts, all with the guest's lock held for writing: nothing changes in between.

use super::plan::{Plan, Step, Terms};
use super::vm::VmCore;
use crate::addr::Gfn;
use crate::error::Errno;
use crate::geometry::{HUGE_PAGES, index};
use crate::hyp::el2::{El2, GuestAnswer, HostCall, Mapped, PIECE};
use crate::hyp::hypercall::{MEM_SHARE, MEM_UNSHARE};
use crate::hyp::vm::{Life, VmKind, VmState};
use crate::range::GfnRange;
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
        prepare: &mut dyn FnMut(GuestRun),
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
        for piece in runs.iter().flat_map(|&run| pieces(run)) {
            self.give_way();
            match plan.is_reached {
                true => self.with_guest_stopped(piece.gfn, piece.nr_pages, || prepare(piece)),
                false => prepare(piece),
            }
        }
        for &(run, step) in &plan.parts {
            let mut at = 0;
            while at < run.nr_pages {
                let (gfn, pfn) = (run.gfn.get() + at, run.pfn.get() + at);
                // To the end of what one block could be: then others may have the CPU.
                self.give_way();
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

    /// Does something with what the guest has in a range, leaf by leaf: some are looked at, then it is done with no lock of
    /// EL2's held.
    pub(super) fn each_leaf(
        &self,
        gfn: Gfn,
        nr_pages: u64,
        mut act: impl FnMut(&[Mapped]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let end = gfn.checked_add(nr_pages).ok_or(Errno::ERANGE)?;
        let mut next = Some(gfn).filter(|&gfn| gfn < end);
        while let Some(from) = next {
            self.give_way();
            let leaves;
            (leaves, next) = self.look_at_guest().leaves(from, end);
            if !leaves.is_empty() {
                act(&leaves)?;
            }
        }
        Ok(())
    }

    /// Takes back or hides what the guest has of some runs.
    fn take_all_back(&self, runs: impl Iterator<Item = GuestRun>) -> Result<(), Errno> {
        let take_back = |leaves: &[Mapped]| leaves.iter().try_for_each(|leaf| self.take_back(leaf));
        for run in runs {
            self.each_leaf(run.gfn, run.nr_pages, take_back)?;
        }
        Ok(())
    }

    /// Refuses runs of which the guest has something.
    fn check_has_none(
        &self,
        runs: impl Iterator<Item = GuestRun>,
        errno: Errno,
    ) -> Result<(), Errno> {
        for run in runs {
            self.each_leaf(run.gfn, run.nr_pages, |_| Err(errno))?;
        }
        Ok(())
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
            let look = self.look_at_guest();
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

/// A run in pieces: the lock under which one is prepared is not held for more.
fn pieces(run: GuestRun) -> impl Iterator<Item = GuestRun> {
    (0..run.nr_pages).step_by(index(PIECE)).map_while(move |at| {
        let (gfn, pfn) = (run.gfn.checked_add(at)?, run.pfn.checked_add(at)?);
        Some(GuestRun { gfn, pfn, nr_pages: PIECE.min(run.nr_pages - at) })
    })
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
    fn make_private(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        match self.kind() {
            VmKind::Protected => {
                self.convert(&self.book.state.write(), runs, Visibility::Private, prepare)
            }
            VmKind::NonProtected => Err(Errno::EOPNOTSUPP),
        }
    }

    fn make_shared(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        let state = self.book.state.write();
        match self.kind() {
            VmKind::Protected => self.convert(&state, runs, Visibility::Shared, prepare),
            VmKind::NonProtected => {
                runs.iter().flat_map(|&run| pieces(run)).for_each(prepare);
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
                if self.look_at_guest().guest(page.gfn) == Err(Errno::EHWPOISON) {
                    // Destroyed since the guest touched it. When it looks again it finds that.
                    return Ok(Faulted::Mapped);
                }
                let block = block.filter(|block| {
                    let donates = self.host.profile.donates(HUGE_PAGES);
                    donates && self.look_at_guest().is_vacant_block(block.gfn)
                });
                let run = block.unwrap_or(page);
                self.convert(&state, &[run], side, &mut |_| ())?;
                Ok(Faulted::Mapped)
            }
            _ => Ok(Faulted::OtherSide),
        }
    }

    /// What is not protected has nothing to itself.
    fn takes(&self, side: Visibility) -> bool {
        (side == Visibility::Private) == (self.kind() == VmKind::Protected)
    }

    fn fixes_sides(&self) -> bool {
        self.kind() == VmKind::NonProtected
    }

    fn may_be(&self, _: GfnRange, side: Visibility) -> bool {
        self.kind() == VmKind::Protected || side == Visibility::Shared
    }

    fn note_prevented(&self, what: Prevented) {
        self.book.prevented.note(what);
    }

    /// A protected guest maps no page that is not its own, and what it owns nobody takes out of its table while it
    /// lives.
    fn invalidate_range(&self, runs: &[GuestRun]) {
        if self.kind() == VmKind::NonProtected {
            let _state = self.book.state.write();
            let hidden = self.take_all_back(runs.iter().copied());
            debug_assert_eq!(hidden, Ok(()), "what is shown can be hidden");
        }
    }

    fn reclaim(&self, runs: &[GuestRun]) -> Result<(), Errno> {
        if self.kind() == VmKind::NonProtected {
            return Ok(());
        }
        let state = self.book.state.write();
        runs.iter().try_for_each(|run| self.check_memory(*run))?;
        let runs = runs.iter().copied();
        match state.life {
            Life::Alive => self.check_has_none(runs, Errno::EBUSY),
            _ => self.take_all_back(runs),
        }
    }

    /// What a protected guest has been given, or shares, stays where it is: pKVM has no hypercall that would move such a
    /// page. What another is shown is hidden, and it faults on the new frames.
    fn migrate(&self, moves: &[GuestMove], copy: &mut dyn FnMut()) -> Result<(), Errno> {
        let _state = self.book.state.write();
        moves.iter().try_for_each(|it| self.check_memory(it.from))?;
        let from = moves.iter().map(|one| one.from);
        match self.kind() {
            VmKind::Protected => self.check_has_none(from, Errno::EPERM)?,
            VmKind::NonProtected => self.take_all_back(from)?,
        }
        copy();
        Ok(())
    }
}
