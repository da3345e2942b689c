//! Android's guests show and hide runs of pages, and blocks as they are.
//!
//! A run goes as far as one physical run does, and over 256 entries at most: so no table is ever full of pages that
//! could be one block. Within it all must be in one state. The guest is told how much was done, and asks for the rest.

use super::super::guest_mmu::{GuestMmu, state_of};
use super::super::host_mmu::{HostMmu, Owner};
use super::super::profile::Profile;
use super::super::spec::SpecPage;
use super::super::{Pages, State};
use super::touched;
use crate::addr::Gfn;
use crate::error::Errno;
use crate::stage2::{Entry, Leaf, Level, PageState};

const MOST_ENTRIES: usize = 256;

/// Why nothing was done, and because of which page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stop {
    pub(crate) gfn: Gfn,
    pub(crate) errno: Errno,
}

struct Part {
    gfn: Gfn,
    level: Level,
    leaf: Leaf,
}

impl Part {
    fn pages(&self) -> Pages {
        Pages::new(self.leaf.pfn, GuestMmu::SHAPE.pages_at(self.level))
    }
}

/// A run of a guest's pages that can go on together.
struct Run(Vec<Part>);

impl Run {
    fn find(guest: &GuestMmu, first: Gfn, nr_pages: u64, wanted: State) -> Result<Self, Stop> {
        let end = first.checked_add(nr_pages).filter(|&end| end <= GuestMmu::SHAPE.gfn_limit());
        let Some(end) = end else { return Err(Stop { gfn: first, errno: Errno::EINVAL }) };
        let mut parts: Vec<Part> = Vec::new();
        let mut gfn = first;
        while gfn < end && parts.len() < MOST_ENTRIES {
            let stop = |errno| Stop { gfn, errno };
            let (level, pte) = guest.tree.get(gfn).map_err(|error| stop(error.into()))?;
            match state_of(level, pte) {
                state if state == wanted => {}
                State::NoPage => return Err(stop(Errno::ENOENT)),
                State::Poison => return Err(stop(Errno::EHWPOISON)),
                _ => return Err(stop(Errno::EPERM)),
            }
            let Entry::Leaf(leaf) = pte.decode(level) else { return Err(stop(Errno::EINVAL)) };
            let span = GuestMmu::SHAPE.pages_at(level);
            if gfn.get() % span != 0 {
                return Err(stop(Errno::E2BIG));
            }
            let follows = |last: &Part| last.pages().end() == Some(leaf.pfn);
            if parts.last().is_some_and(|last| !follows(last)) {
                break;
            }
            if end.get() - gfn.get() < span {
                return Err(stop(Errno::E2BIG));
            }
            parts.push(Part { gfn, level, leaf });
            gfn = Gfn::new(gfn.get() + span);
        }
        Ok(Self(parts))
    }

    /// All of it, by frame.
    fn pages(&self) -> Pages {
        let nr = self.0.iter().map(|part| part.pages().nr()).sum();
        self.0
            .first()
            .map_or(Pages::new(crate::addr::Pfn::new(0), 0), |first| Pages::new(first.leaf.pfn, nr))
    }

    fn check_host(&self, host: &HostMmu, state: State) -> Result<(), Stop> {
        let Some(first) = self.0.first() else { return Ok(()) };
        host.check_state(self.pages(), state).map_err(|errno| Stop { gfn: first.gfn, errno })
    }
}

fn set_state(guest: &mut GuestMmu, part: &Part, state: PageState) -> Result<(), Stop> {
    let leaf = Leaf { state, ..part.leaf };
    let mapped = guest.map(part.gfn, part.level, leaf, &mut Vec::new());
    mapped.map_err(|errno| Stop { gfn: part.gfn, errno })
}

/// A guest shows a run of its own pages to the host; how many.
///
/// # Errors
/// `EINVAL` beyond the guest's addresses; then of the first page that is not as it should be: `ENOENT`, `EHWPOISON`,
/// `EPERM` for one that is not the guest's alone, `E2BIG` for one of a block that the run does not cover.
pub(crate) fn guest_share_run(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    first: Gfn,
    nr_pages: u64,
) -> Result<u64, Stop> {
    let run = Run::find(guest, first, nr_pages, State::Owned)?;
    run.check_host(host, State::NoPage)?;
    for part in &run.0 {
        let pages = part.pages();
        set_state(guest, part, PageState::SharedOwned)?;
        // Each entry takes the place of others, so no table is wanting.
        host.take_back(pages, State::SharedBorrowed)
            .map_err(|errno| Stop { gfn: part.gfn, errno })?;
        for (pfn, nth) in pages.iter().zip(0..) {
            host.spec.step(pfn, SpecPage::GuestAndHost(guest.at(part.gfn).after(nth)));
        }
    }
    touched(host, run.pages());
    Ok(run.pages().nr())
}

/// And hides it again; how many pages.
///
/// # Errors
/// As for [`guest_share_run`]; `ENOMEMHOSTS2` if the host's tables have no room to say whose each page is.
pub(crate) fn guest_unshare_run(
    profile: Profile,
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    first: Gfn,
    nr_pages: u64,
) -> Result<u64, Stop> {
    let run = Run::find(guest, first, nr_pages, State::SharedOwned)?;
    run.check_host(host, State::SharedBorrowed)?;
    let wanting = |gfn| move |errno| Stop { gfn, errno: profile.host_tables_short(errno) };
    host.provide(run.pages(), Level::PAGE).map_err(wanting(first))?;
    for part in &run.0 {
        let (pages, owner) = (part.pages(), Owner::Guest(guest.at(part.gfn)));
        host.give(pages, owner, Level::PAGE).map_err(wanting(part.gfn))?;
        set_state(guest, part, PageState::Owned)?;
        for (pfn, nth) in pages.iter().zip(0..) {
            host.spec.step(pfn, SpecPage::Guest(guest.at(part.gfn).after(nth)));
        }
    }
    touched(host, run.pages());
    Ok(run.pages().nr())
}
