//! What a call of the object's comes to: for each page a step, all of them checked before the first is made.

use super::vm::VmCore;
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::{HUGE_PAGES, index};
use crate::hyp::el2::{Look, Mapped, PIECE, State};
use crate::stage2::{GuestRun, Missing};
use crate::state::Visibility;

/// What is to be done for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Nothing,
    Donate,
    Share,
    Unshare,
}

impl Step {
    /// Whether only the guest may ask for it.
    fn is_the_guests_wish(self) -> bool {
        matches!(self, Self::Share | Self::Unshare)
    }
}

/// Steps for runs of pages, and how many tables they may need.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) parts: Vec<(GuestRun, Step)>,
    pub(super) nr_tables: u64,
    /// Whether the guest has any of the pages.
    pub(super) is_reached: bool,
}

/// Whose life it is and who has asked for what.
pub(super) struct Terms<'a> {
    pub(super) is_alive: bool,
    pub(super) to: Visibility,
    pub(super) consents: &'a dyn Fn(Gfn) -> bool,
}

/// The pages of a run, as far as they can be numbered.
fn pages(run: GuestRun) -> impl Iterator<Item = (Gfn, Pfn)> {
    (0..run.nr_pages).map_while(move |i| Some((run.gfn.checked_add(i)?, run.pfn.checked_add(i)?)))
}

/// Refuses runs that name a guest frame or a frame twice: each would be checked as if the other had
/// not happened.
fn check_disjoint(runs: &[GuestRun]) -> Result<(), Errno> {
    if runs.len() < 2 {
        return Ok(());
    }
    let mut sorted: Vec<GuestRun> = Vec::new();
    sorted.try_reserve_exact(runs.len()).map_err(|_| Errno::ENOMEM)?;
    let starts: [fn(&GuestRun) -> u64; 2] = [|run| run.gfn.get(), |run| run.pfn.get()];
    for start in starts {
        sorted.clear();
        sorted.extend(runs.iter().filter(|run| run.nr_pages > 0));
        sorted.sort_unstable_by_key(start);
        let overlap =
            |pair: &[GuestRun]| start(&pair[0]).saturating_add(pair[0].nr_pages) > start(&pair[1]);
        if sorted.windows(2).any(overlap) {
            return Err(Errno::EINVAL);
        }
    }
    Ok(())
}

impl Plan {
    /// Looks at every page of a protected guest's, a piece at a time: the guest's lock, held for writing, sees to it that what
    /// was found stays so.
    ///
    /// # Errors
    /// `EINVAL` for runs that name a page twice; for the first page that has one: EL2's, in its order, and then
    /// `EPERM` for what the guest has to ask for and has not.
    pub(super) fn new(core: &VmCore, runs: &[GuestRun], terms: &Terms<'_>) -> Result<Self, Errno> {
        check_disjoint(runs)?;
        runs.iter().try_for_each(|run| core.check_memory(*run))?;
        let mut plan = Self::default();
        let mut missing = Missing::default();
        let mut last_block = None;
        let mut pages = runs.iter().flat_map(|&run| pages(run));
        let mut left = runs.iter().fold(0_u64, |sum, run| sum.saturating_add(run.nr_pages));
        while left > 0 {
            let nr_now = left.min(PIECE);
            left -= nr_now;
            // With no lock of EL2's held.
            plan.parts.try_reserve(index(nr_now)).map_err(|_| Errno::ENOMEM)?;
            core.give_way();
            let look = core.look();
            for (gfn, pfn) in pages.by_ref().take(index(nr_now)) {
                let has = look.guest(gfn);
                let step = match terms.to {
                    Visibility::Private => to_private(&look, has, pfn, terms.is_alive)?,
                    Visibility::Shared => to_shared(&look, has, gfn, pfn)?,
                };
                if step.is_the_guests_wish() && !(terms.consents)(gfn) {
                    return Err(Errno::EPERM);
                }
                let block = Some((gfn.get() / HUGE_PAGES, step));
                if last_block != block {
                    match step {
                        Step::Donate => look.count_missing(gfn, &mut missing)?,
                        // A block is split first, and needs a table.
                        Step::Share => plan.nr_tables += 1,
                        Step::Nothing | Step::Unshare => {}
                    }
                    last_block = block;
                }
                plan.is_reached |= has.is_ok();
                plan.add(gfn, pfn, step);
            }
        }
        plan.nr_tables += missing.nr;
        Ok(plan)
    }

    /// There is room.
    fn add(&mut self, gfn: Gfn, pfn: Pfn, step: Step) {
        if step == Step::Nothing {
            return;
        }
        if let Some((run, last)) = self.parts.last_mut() {
            let follows = |start: u64, at: u64| start.checked_add(run.nr_pages) == Some(at);
            let is_next = follows(run.gfn.get(), gfn.get()) && follows(run.pfn.get(), pfn.get());
            if *last == step && is_next {
                run.nr_pages += 1;
                return;
            }
        }
        self.parts.push((GuestRun { gfn, pfn, nr_pages: 1 }, step));
    }
}

/// What the guest has at a page.
type Has = Result<Mapped, Errno>;

fn to_private(look: &Look<'_>, has: Has, pfn: Pfn, is_alive: bool) -> Result<Step, Errno> {
    match has {
        Ok(has) if has.pfn != pfn => Err(Errno::EPERM),
        Ok(has) if has.state == State::Owned => Ok(Step::Nothing),
        Ok(has) => match (has.state, look.host(pfn)) {
            (State::SharedOwned, State::SharedBorrowed) => Ok(Step::Unshare),
            _ => Err(Errno::EPERM),
        },
        Err(_) if !is_alive => Err(Errno::EINVAL),
        Err(_) if !look.can_be_given(pfn) => Err(Errno::EPERM),
        Err(Errno::ENOENT) => Ok(Step::Donate),
        // Where a page was destroyed nothing can be given any more.
        Err(Errno::EHWPOISON) => Err(Errno::EPERM),
        Err(errno) => Err(errno),
    }
}

fn to_shared(look: &Look<'_>, has: Has, gfn: Gfn, pfn: Pfn) -> Result<Step, Errno> {
    match has {
        Ok(has) if has.pfn != pfn => Err(Errno::EPERM),
        Ok(has) if has.state == State::SharedOwned => Ok(Step::Nothing),
        Ok(has) => match has.state == State::Owned && look.is_down_as(pfn, gfn) {
            true => Ok(Step::Share),
            false => Err(Errno::EPERM),
        },
        Err(Errno::EHWPOISON) => Err(Errno::EHWPOISON),
        // Never given to the guest: the host's to see anyway.
        Err(_) if look.host(pfn) == State::Owned => Ok(Step::Nothing),
        Err(_) => Err(Errno::EPERM),
    }
}
