//! Android's host gives a protected guest a list of pages and blocks, all or none.

use std::collections::BTreeSet;

use super::super::Pages;
use super::super::firmware::Load;
use super::super::guest_mmu::GuestMmu;
use super::super::host_mmu::{HostMmu, Owner};
use super::super::host_struct::ListedPages;
use super::super::profile::Profile;
use super::super::spec::SpecPage;
use super::np::NpRange;
use super::{check_given, frame, guest_frame, touched};
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::stage2::{Leaf, Level, PageState, Prot};

/// One entry of the list, once it is known to be one.
#[derive(Clone, Copy, Debug)]
struct Gift {
    pages: Pages,
    gfn: Gfn,
    level: Level,
    /// What of the guest's firmware goes there.
    load: Option<Load>,
}

impl Gift {
    fn new(listed: ListedPages) -> Result<Self, Errno> {
        let nr_pages = 1_u64.checked_shl(u32::from(listed.order)).ok_or(Errno::EINVAL)?;
        let pages = Pages::checked(listed.pfn, nr_pages)?;
        let range = NpRange::new(guest_frame(listed.gfn), nr_pages)?;
        match frame(listed.pfn).get() % nr_pages {
            0 => Ok(Self { pages, gfn: range.gfn, level: range.level(), load: None }),
            _ => Err(Errno::EINVAL),
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        let end = |gift: &Self| gift.gfn.get() + gift.pages.nr();
        self.gfn.get() < end(other) && other.gfn.get() < end(self)
    }
}

/// Tables that all gifts together need. Several may need the same one.
#[derive(Default)]
struct Missing(BTreeSet<(u64, u64)>);

impl Missing {
    fn add(&mut self, guest: &GuestMmu, gift: &Gift) -> Result<(), Errno> {
        let (mut level, _) = guest.tree.get(gift.gfn)?;
        while level < gift.level {
            let span = GuestMmu::SHAPE.pages_at(level);
            self.0.insert((span, gift.gfn.get() / span));
            level = level.below();
        }
        Ok(())
    }
}

/// The host gives what it has listed. Entry by entry it is looked at and taken from the host; if one cannot be, those
/// before it go back. Only then does the guest get them.
///
/// # Errors
/// `EINVAL` for an empty list; of the first entry that is not as it should be: `EINVAL` for frames that no address
/// reaches, for an order that is neither a page's nor a block's, and for what is misaligned; as for
/// [`donate_guest`](super::donate_guest) for the host's side and the guest's; `ENOMEMHOSTS2`; then `ENOMEM` for a
/// memcache with less than all of it needs; `EIO` if memory that a firmware is in or goes to is broken, and what is broken does
/// not go back.
pub(crate) fn donate_list(
    profile: Profile,
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    memcache: &mut Vec<Pfn>,
    list: &[ListedPages],
) -> Result<(), Errno> {
    let mut gifts = Vec::new();
    let mut nr_loaded = 0;
    let taken = take(profile, host, guest, list, &mut gifts)
        .and_then(|missing| guest.reserve(missing.0.len() as u64, memcache))
        .and_then(|()| {
            gifts.iter().try_for_each(|gift| {
                nr_loaded += 1;
                host.load(gift.load)
            })
        });
    if let Err(errno) = taken {
        for (gift, nth) in gifts.iter().zip(0..) {
            // Where nothing was loaded the host's bytes are still there.
            let load = gift.load.filter(|_| nth < nr_loaded);
            host.ungive(guest.at(gift.gfn), gift.pages, load);
        }
        return Err(errno);
    }
    for gift in gifts {
        for (pfn, nth) in gift.pages.iter().zip(0..) {
            host.spec.step(pfn, SpecPage::Guest(guest.at(gift.gfn).after(nth)));
        }
        let leaf = Leaf { pfn: gift.pages.start(), prot: Prot::RWX, state: PageState::Owned };
        guest.map(gift.gfn, gift.level, leaf, memcache)?;
        touched(host, gift.pages);
    }
    Ok(())
}

fn take(
    profile: Profile,
    host: &mut HostMmu,
    guest: &GuestMmu,
    list: &[ListedPages],
    gifts: &mut Vec<Gift>,
) -> Result<Missing, Errno> {
    let mut missing = Missing::default();
    if list.is_empty() {
        return Err(Errno::EINVAL);
    }
    for &listed in list {
        let mut gift = Gift::new(listed)?;
        check_given(profile, host, gift.pages)?;
        guest.vacancy(gift.gfn, gift.level)?;
        if gifts.iter().any(|other| other.overlaps(&gift)) {
            return Err(Errno::EPERM);
        }
        gift.load = host.firmware_for(guest.firmware_at, gift.gfn, gift.pages)?;
        missing.add(guest, &gift)?;
        let owner = Owner::Guest(guest.at(gift.gfn));
        let given = host.give(gift.pages, owner, Level::PAGE);
        given.map_err(|errno| profile.host_tables_short(errno))?;
        gifts.push(gift);
    }
    Ok(missing)
}
