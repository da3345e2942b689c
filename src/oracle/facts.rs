//! What the model says of itself: what there is to pick from, and what should be seen from outside.

use super::answer::{PageFacts, Run, pages_of};
use super::mistake::Mistake;
use super::model::Model;
use super::object::Object;
use crate::backing::{ArenaBacking, WhyKept};
use crate::gmem::PinMode;
use crate::state::Visibility;

/// The counters of an object, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ObjectFacts {
    pub(super) size: u64,
    pub(super) resident: u64,
    pub(super) holes: u64,
    pub(super) released: u64,
    pub(super) shared: u64,
    pub(super) private: u64,
    pub(super) pinned: u64,
    pub(super) mapped: u64,
    pub(super) quarantined: u64,
}

/// The counters of a pool, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PoolFacts {
    pub(super) capacity: u64,
    pub(super) free: u64,
    pub(super) reserved: u64,
    pub(super) used: u64,
    pub(super) quarantined: u64,
}

/// Joins neighbouring pages that are alike.
fn runs<T: PartialEq>(pages: impl Iterator<Item = (u64, T)>) -> Vec<(Run, T)> {
    let mut runs: Vec<(Run, T)> = Vec::new();
    for (page, what) in pages {
        match runs.last_mut() {
            Some((run, before)) if *before == what => run.1 += 1,
            _ => runs.push(((page, 1), what)),
        }
    }
    runs
}

fn pick(of: usize, claim: u8) -> Option<usize> {
    usize::from(claim).checked_rem(of)
}

impl Model {
    /// The objects that somebody still refers to.
    pub(super) fn alive(&self) -> impl Iterator<Item = (usize, &Object)> {
        self.objects.iter().enumerate().filter(|(_, object)| !object.is_gone)
    }

    fn with_handle(&self) -> impl Iterator<Item = (usize, &Object)> {
        self.alive().filter(|(_, object)| object.has_handle)
    }

    pub(super) fn nr_handles(&self) -> usize {
        self.with_handle().count()
    }

    /// An object with a handle, mostly the oldest, and how many pages it has.
    pub(super) fn pick_object(&self, claim: u8) -> Option<(usize, u64)> {
        let at = pick(self.nr_handles(), claim.saturating_sub(112))?;
        self.with_handle().nth(at).map(|(at, object)| (at, object.nr_pages()))
    }

    pub(super) fn pick_pin(&self, claim: u8) -> Option<usize> {
        pick(self.pins.len(), claim)
    }

    pub(super) fn nr_pins(&self) -> usize {
        self.pins.len()
    }

    pub(super) fn nr_views(&self, object: usize) -> usize {
        self.objects.get(object).map_or(0, |object| object.nr_views)
    }

    pub(super) fn nr_pages(&self, object: usize) -> u64 {
        self.objects.get(object).map_or(0, Object::nr_pages)
    }

    pub(super) fn sides(&self, object: usize, range: Run) -> Vec<(Run, Visibility)> {
        let Some(object) = self.objects.get(object) else { return Vec::new() };
        let side = |page| object.page(page).map(|it| (page, it.visibility));
        runs(pages_of(range).filter_map(side))
    }

    pub(super) fn facts(&self, object: usize, range: Run) -> Vec<(Run, PageFacts)> {
        runs(pages_of(range).filter_map(|page| Some((page, self.page_facts(object, page)?))))
    }

    fn page_facts(&self, object: usize, page: u64) -> Option<PageFacts> {
        let modes: Vec<PinMode> = self.pins_on(object, (page, 1)).map(|pin| pin.mode).collect();
        let object = self.objects.get(object)?;
        let counted = modes.iter().filter(|&&mode| mode == PinMode::Counted).count();
        Some(PageFacts {
            visibility: object.page(page)?.visibility,
            pins: u32::try_from(counted).ok()?,
            exclusive: counted < modes.len(),
            resident: object.is_resident(page),
        })
    }

    pub(super) fn object_facts(&self, at: usize) -> ObjectFacts {
        let Some(object) = self.objects.get(at) else { return ObjectFacts::default() };
        let count = |wanted: &dyn Fn(u64) -> bool| {
            (0..object.nr_pages()).filter(|&page| wanted(page)).count() as u64
        };
        let released = |page| object.is_hole(page) && self.why_kept().is_none();
        ObjectFacts {
            size: object.nr_pages(),
            resident: count(&|page| object.has_folio(page) && !released(page)),
            holes: count(&|page| object.is_hole(page)),
            released: count(&released),
            shared: count(&|page| object.is(page, Visibility::Shared)),
            private: count(&|page| object.is(page, Visibility::Private)),
            pinned: count(&|page| self.pins_on(at, (page, 1)).next().is_some()),
            mapped: match object.nr_views {
                0 => 0,
                _ => count(&|page| self.is_touchable(at, page)),
            },
            quarantined: 0,
        }
    }

    /// Why punched memory stays with the pool, if it does.
    pub(super) fn why_kept(&self) -> Option<WhyKept> {
        match self.backing {
            ArenaBacking::Heap => Some(WhyKept::Heap),
            ArenaBacking::Memfd => None,
            ArenaBacking::MemfdThp => Some(WhyKept::TransparentHuge),
            ArenaBacking::MemfdHugetlb2M | ArenaBacking::MemfdHugetlb1G => Some(WhyKept::Hugetlb),
        }
    }

    /// Whether a view shows the page: it is shared and there. Where views know huge pages only, all
    /// of its folio has to be.
    pub(super) fn is_touchable(&self, object: usize, page: u64) -> bool {
        let Some(object) = self.objects.get(object) else { return false };
        let together = match self.backing {
            ArenaBacking::MemfdHugetlb2M | ArenaBacking::MemfdHugetlb1G => object.folio_at(page),
            _ => (page, 1),
        };
        let shared = pages_of(together).all(|page| object.is(page, Visibility::Shared));
        let resident = pages_of(together).all(|page| object.is_resident(page));
        resident && (shared || self.errs(Mistake::ViewsMapPrivatePages))
    }

    pub(super) fn pool_facts(&self) -> PoolFacts {
        let free = self.ledger.nr_free();
        PoolFacts {
            capacity: self.ledger.capacity(),
            free: free.saturating_sub(self.promised().0),
            reserved: self.promised().0,
            used: self.ledger.capacity() - free,
            quarantined: 0,
        }
    }

    pub(super) fn byte(&self, object: usize, at: u64) -> u8 {
        self.objects.get(object).map_or(0, |object| object.byte(at))
    }

    /// The bytes of a page; none if they are all zeroes because nothing was written since.
    pub(super) fn page_bytes(&self, object: usize, page: u64) -> Option<&[u8]> {
        self.objects.get(object)?.page(page)?.bytes.as_deref()
    }
}
