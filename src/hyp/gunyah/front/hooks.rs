//! What objects ask: memory is lent, shared, turned from one into the other, taken back.
//!
//! What a guest has asked for keeps its bytes. Whatever else takes memory from it that it had to itself has it cleared on
//! the way: Gunyah does so only if somebody says so.

use super::SharedMemory;
use super::vm::VmCore;
use crate::addr::Gfn;
use crate::error::Errno;
use crate::hyp::gunyah::host::{Contents, Guest, Side};
use crate::hyp::vm::{Life, VmKind, VmState};
use crate::range::GfnRange;
use crate::stage2::{Faulted, GuestMove, GuestRun, Prevented, Stage2};
use crate::state::Visibility;

/// What is to be done for the pages of a call.
#[derive(Debug, Default)]
struct Plan {
    /// What the guest has not.
    absent: Vec<GuestRun>,
    /// What it has on the other side.
    turning: Vec<GuestRun>,
}

impl Plan {
    /// Looks at all of it.
    ///
    /// # Errors
    /// `EPERM` if the guest has other frames there; `ENOMEM`.
    fn new(guest: &Guest, runs: &[GuestRun], to: Side) -> Result<Self, Errno> {
        let mut plan = Self::default();
        for run in runs {
            let mut nr_done = 0;
            while nr_done < run.nr_pages {
                let gfn = run.gfn.checked_add(nr_done).ok_or(Errno::EINVAL)?;
                let pfn = run.pfn.checked_add(nr_done).ok_or(Errno::EINVAL)?;
                let (given, nr_pages) = guest.given(gfn, run.nr_pages - nr_done);
                let list = match given {
                    Some(given) if given.run.pfn != pfn => return Err(Errno::EPERM),
                    Some(given) if given.side == to => None,
                    Some(_) => Some(&mut plan.turning),
                    None => Some(&mut plan.absent),
                };
                if let Some(list) = list {
                    list.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
                    list.push(GuestRun { gfn, pfn, nr_pages });
                }
                nr_done += nr_pages.max(1);
            }
        }
        Ok(plan)
    }

    /// Whether the guest has asked for all that changes sides.
    fn is_consented(&self, state: &VmState, to: Visibility) -> bool {
        let mut gfns = self
            .turning
            .iter()
            .flat_map(|run| (0..run.nr_pages).map(|nth| Gfn::new(run.gfn.get() + nth)));
        gfns.all(|gfn| state.consents(gfn, to))
    }
}

const fn side_of(visibility: Visibility) -> Side {
    match visibility {
        Visibility::Private => Side::Lent,
        Visibility::Shared => Side::Shared,
    }
}

impl VmCore {
    /// The part of some runs that the guest has, and has so.
    fn given_in(
        &self,
        guest: &Guest,
        runs: impl Iterator<Item = GuestRun>,
        side: Side,
    ) -> Result<Vec<GuestRun>, Errno> {
        let mut found: Vec<GuestRun> = Vec::new();
        for run in runs {
            let mut nr_done = 0;
            while nr_done < run.nr_pages {
                let gfn = run.gfn.checked_add(nr_done).ok_or(Errno::EINVAL)?;
                let (given, nr_pages) = guest.given(gfn, run.nr_pages - nr_done);
                if let Some(given) = given.filter(|given| given.side == side) {
                    found.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
                    found.push(given.run);
                }
                nr_done += nr_pages.max(1);
            }
        }
        Ok(found)
    }

    /// Takes what the guest only sees, which the host has not lost.
    fn hide(&self, guest: &mut Guest, runs: impl Iterator<Item = GuestRun>) -> Result<(), Errno> {
        let shared = self.given_in(guest, runs, Side::Shared)?;
        match shared.is_empty() {
            true => Ok(()),
            false => guest.reclaim(&shared, Contents::Keep),
        }
    }

    fn is_static(&self) -> bool {
        self.kind() == VmKind::Protected && self.host.policy == SharedMemory::Static
    }
}

impl Stage2 for VmCore {
    fn make_private(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        if self.kind() == VmKind::NonProtected {
            return Err(Errno::EOPNOTSUPP);
        }
        let state = self.book.state.write();
        let mut guest = self.guest.lock();
        let plan = Plan::new(&guest, runs, Side::Lent)?;
        if !plan.is_consented(&state, Visibility::Private) {
            return Err(Errno::EPERM);
        }
        if state.life != Life::Alive && !plan.absent.is_empty() {
            return Err(Errno::EINVAL);
        }
        let mut prepare_all = || runs.iter().for_each(|&run| prepare(run));
        match (plan.turning.is_empty(), plan.absent.is_empty()) {
            (true, true) => {
                prepare_all();
                Ok(())
            }
            (false, true) => guest.turn(&plan.turning, Side::Lent, &mut prepare_all),
            (true, false) => guest.provide(&plan.absent, Side::Lent, true, &mut prepare_all),
            (false, false) => guest.lend_all(&plan.turning, &plan.absent, &mut prepare_all),
        }
    }

    fn make_shared(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        let state = self.book.state.write();
        let mut guest = self.guest.lock();
        let plan = Plan::new(&guest, runs, Side::Shared)?;
        if !plan.is_consented(&state, Visibility::Shared) {
            return Err(Errno::EPERM);
        }
        let mut prepare_all = || runs.iter().for_each(|&run| prepare(run));
        if plan.turning.is_empty() {
            prepare_all();
            return Ok(());
        }
        guest.turn(&plan.turning, Side::Shared, &mut prepare_all)
    }

    fn fault(
        &self,
        side: Visibility,
        page: GuestRun,
        block: Option<GuestRun>,
    ) -> Result<Faulted, Errno> {
        let state = self.book.state.write();
        if state.life != Life::Alive {
            return Err(Errno::EINVAL);
        }
        let fits = |run: &GuestRun| {
            let gfns = GfnRange::new(run.gfn, run.nr_pages);
            !self.is_static() || gfns.is_ok_and(|gfns| state.were_all(gfns, side))
        };
        if !self.takes(side) || !fits(&page) {
            return Ok(Faulted::OtherSide);
        }
        let mut guest = self.guest.lock();
        match guest.given(page.gfn, 1) {
            // Another vCPU was faster.
            (Some(given), _) if given.run.pfn == page.pfn => return Ok(Faulted::Mapped),
            (Some(_), _) => return Err(Errno::EPERM),
            (None, _) => {}
        }
        let is_vacant =
            |block: &GuestRun| guest.given(block.gfn, block.nr_pages) == (None, block.nr_pages);
        let run = block.filter(|block| is_vacant(block) && fits(block)).unwrap_or(page);
        guest.provide(&[run], side_of(side), true, &mut || ())?;
        Ok(Faulted::Mapped)
    }

    /// What is shared is provided like what is lent.
    fn takes(&self, side: Visibility) -> bool {
        self.kind() == VmKind::Protected || side == Visibility::Shared
    }

    fn fixes_sides(&self) -> bool {
        self.kind() == VmKind::NonProtected || self.is_static()
    }

    fn may_be(&self, gfns: GfnRange, side: Visibility) -> bool {
        match self.kind() {
            VmKind::NonProtected => side == Visibility::Shared,
            VmKind::Protected => !self.is_static() || self.book.read().were_all(gfns, side),
        }
    }

    fn note_prevented(&self, what: Prevented) {
        self.book.prevented.note(what);
    }

    fn invalidate_range(&self, runs: &[GuestRun]) {
        let _state = self.book.state.write();
        let mut guest = self.guest.lock();
        // In pieces, for which there are always tables.
        for run in runs {
            let mut nr_done = 0;
            while let Some(gfn) = run.gfn.checked_add(nr_done).filter(|_| nr_done < run.nr_pages) {
                let (given, nr_pages) = guest.given(gfn, run.nr_pages - nr_done);
                if let Some(given) = given.filter(|given| given.side == Side::Shared) {
                    let hidden = guest.reclaim(&[given.run], Contents::Keep);
                    debug_assert_eq!(hidden, Ok(()), "what is shown can be hidden");
                }
                nr_done += nr_pages.max(1);
            }
        }
    }

    /// As the original's host does: also while the guest lives.
    fn reclaim(&self, runs: &[GuestRun]) -> Result<(), Errno> {
        let _state = self.book.state.write();
        self.guest.lock().reclaim(runs, Contents::Clear)
    }

    /// What is shared is hidden, and the guest faults on the new frames. What is lent stays where it is: nobody could
    /// copy it, and a way back that keeps its bytes would show them.
    fn migrate(&self, moves: &[GuestMove], copy: &mut dyn FnMut()) -> Result<(), Errno> {
        let _state = self.book.state.write();
        let mut guest = self.guest.lock();
        let from = moves.iter().map(|one| one.from);
        if !self.given_in(&guest, from.clone(), Side::Lent)?.is_empty() {
            return Err(Errno::EPERM);
        }
        self.hide(&mut guest, from)?;
        copy();
        Ok(())
    }
}
