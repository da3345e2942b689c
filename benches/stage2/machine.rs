//! A machine with a guest of one GiB, whose memory is 512 folios of 2 MiB.

use gmem::addr::{ByteSize, Gfn, Pfn};
use gmem::el2_only::{CpuOnly, El2Only, Kind};

use crate::Outcome;
use crate::bare::BareTree;
use crate::harness::Random;

pub(crate) const GIB_PAGES: u64 = 1 << 18;
const FOLIO: u64 = 512;

/// In which order the guest's pages are gone through.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// As a guest's faults come.
    Random,
    Ascending,
}

/// How calls are made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller {
    /// By a thread that is the CPU all the while.
    IsCpu,
    /// Each by a thread that names the CPU, which is locked for the call.
    NamesCpu,
}

pub(crate) struct Machine {
    pub(crate) el2: El2Only,
    pub(crate) nr_pages: u64,
    pub(crate) caller: Caller,
    /// The first frame of each of the guest's folios.
    folios: Vec<u64>,
    shuffled: Vec<u32>,
    ascending: Vec<u32>,
}

impl Machine {
    /// A machine with so much memory for guests, and the guest's folios anywhere in it.
    pub(crate) fn new(nr_gib: u64) -> Outcome<Self> {
        Self::with_guest(nr_gib, GIB_PAGES)
    }

    pub(crate) fn with_guest(nr_gib: u64, nr_pages: u64) -> Outcome<Self> {
        let el2 = El2Only::boot(ByteSize::from_pages(nr_gib * GIB_PAGES))
            .map_err(|errno| format!("boot: {errno}"))?;
        let first = el2.memory().start().get();
        let mut random = Random::new();
        let mut folios: Vec<_> =
            (0..nr_gib * GIB_PAGES / FOLIO).map(|nth| first + nth * FOLIO).collect();
        shuffle(&mut folios, &mut random);
        folios.truncate((nr_pages / FOLIO) as usize);
        let ascending: Vec<_> = (0..nr_pages as u32).collect();
        let mut shuffled = ascending.clone();
        shuffle(&mut shuffled, &mut random);
        Ok(Self { el2, nr_pages, caller: Caller::IsCpu, folios, shuffled, ascending })
    }

    #[inline]
    pub(crate) fn frame_of(&self, gfn: u64) -> Pfn {
        Pfn::new(self.folios[(gfn / FOLIO) as usize] + gfn % FOLIO)
    }

    /// All of the guest's pages.
    #[inline]
    pub(crate) fn pages(&self, order: Order) -> impl Iterator<Item = u64> + use<'_> {
        let pages = if order == Order::Random { &self.shuffled } else { &self.ascending };
        pages.iter().map(|&gfn| u64::from(gfn))
    }

    /// A new protected guest with all of its pages, shuffled as they came.
    pub(crate) fn protected_guest(&mut self) {
        self.new_guest(Kind::Protected, self.nr_pages);
        self.donate_all(&mut self.cpu(), Order::Random);
    }

    /// The host lists pages for its tables, which EL2 takes with the first call.
    pub(crate) fn new_guest(&mut self, kind: Kind, nr_entries: u64) {
        self.el2.new_guest(kind, nr_entries).expect("there is no other");
    }

    pub(crate) fn cpu(&self) -> CpuOnly<'_> {
        match self.caller {
            Caller::IsCpu => self.el2.enter().expect("a CPU"),
            Caller::NamesCpu => self.el2.by_number(),
        }
    }

    pub(crate) fn donate_all(&self, cpu: &mut CpuOnly<'_>, order: Order) {
        for gfn in self.pages(order) {
            let donated = cpu.donate(self.frame_of(gfn), Gfn::new(gfn));
            donated.expect("the host's page, and nothing there");
        }
    }

    pub(crate) fn reclaim_all(&self, cpu: &mut CpuOnly<'_>, order: Order) {
        for gfn in self.pages(order) {
            cpu.reclaim(Gfn::new(gfn)).expect("a page of a guest that dies");
        }
    }

    /// The guest goes, and what it has to the host before.
    pub(crate) fn end_protected_guest(&mut self) {
        self.el2.stop_guest().expect("a guest");
        self.reclaim_all(&mut self.cpu(), Order::Ascending);
        self.end_guest();
    }

    pub(crate) fn end_guest(&mut self) {
        self.el2.end_guest().expect("a guest that dies");
    }

    /// The host's tree and the guest's, as the peer has them.
    pub(crate) fn bare(&self) -> (BareTree, BareTree) {
        let frames = self.pages(Order::Ascending).map(|gfn| self.frame_of(gfn).get());
        (BareTree::new(frames), BareTree::new(self.pages(Order::Ascending)))
    }
}

fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for at in (1..items.len()).rev() {
        items.swap(at, random.below(at as u64 + 1) as usize);
    }
}
