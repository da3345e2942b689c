use super::super::page::{GuestOwner, VmHandle};
use super::*;
use crate::addr::Pa;
use crate::stage2::{Annotation, Leaf, Prot, Table, TableShape};
use std::sync::Arc;

const NR_FRAMES: u64 = 32;

/// A host of 32 frames and a guest of 64 guest frames, in tables of four entries.
struct World {
    arena: Arc<Arena>,
    host: HostPages,
    guest: GuestPages,
}

impl World {
    fn new() -> Self {
        Self::with_tables(usize::MAX, usize::MAX)
    }

    fn with_tables(hosts: usize, guests: usize) -> Self {
        let table = Table::with_limit(TableShape::new(3, 2, 2).unwrap(), guests).unwrap();
        Self {
            arena: Arena::heap(NR_FRAMES).unwrap(),
            host: HostPages::with_limit(NR_FRAMES, hosts).unwrap(),
            guest: GuestPages { handle: VmHandle(1), table, life: Life::Alive },
        }
    }

    fn parties(&mut self) -> Parties<'_> {
        Parties { host: &mut self.host, guest: &mut self.guest }
    }

    fn donate(&mut self, gfn: u64, pfn: u64) -> Result<(), Errno> {
        self.parties().host_donate_guest(run(gfn, pfn, 1))
    }

    fn share(&mut self, gfn: u64) -> Result<(), Errno> {
        self.parties().guest_share_host(Gfn::new(gfn))
    }

    fn unshare(&mut self, gfn: u64) -> Result<(), Errno> {
        self.parties().guest_unshare_host(Gfn::new(gfn))
    }

    fn reclaim(&mut self, gfn: u64) -> Result<(), Errno> {
        let arena = Arc::clone(&self.arena);
        self.parties().reclaim_dying_guest_page(Gfn::new(gfn), &arena)
    }

    /// Everything that a refused operation must leave alone.
    fn picture(&self) -> String {
        let host: Vec<_> = self.host.taken().collect();
        let guest: Vec<_> = self.guest.table.entries().collect();
        format!("{host:?} {guest:?}")
    }

    /// Asserts that the operation is refused with this errno and changes nothing.
    #[track_caller]
    fn refuses(&mut self, errno: Errno, act: impl FnOnce(&mut Self) -> Result<(), Errno>) {
        let before = self.picture();
        assert_eq!(act(self), Err(errno));
        assert_eq!(self.picture(), before);
    }

    fn poison(&mut self, gfn: u64) {
        let kind = Annotation::GuestPoisoned;
        self.guest.table.annotate(Gfn::new(gfn), kind, 0).unwrap();
    }

    fn leaf(&mut self, gfn: u64, level: Level, pfn: u64, state: PageState) {
        let leaf = Leaf { pfn: Pfn::new(pfn), prot: Prot::RWX, state };
        self.guest.table.map(Gfn::new(gfn), level, leaf).unwrap();
    }

    fn fill(&self, pfn: u64) {
        self.arena.write(Pfn::new(pfn).pa(), &[0xaa; 4096]).unwrap();
    }

    fn byte(&self, pfn: u64) -> u8 {
        let mut byte = [0];
        self.arena.read(Pa::new(pfn * 4096 + 77), &mut byte).unwrap();
        byte[0]
    }
}

fn run(gfn: u64, pfn: u64, nr_pages: u64) -> GuestRun {
    GuestRun { gfn: Gfn::new(gfn), pfn: Pfn::new(pfn), nr_pages }
}

fn owner(gfn: u64) -> GuestOwner {
    GuestOwner { handle: VmHandle(1), gfn: Gfn::new(gfn) }
}

#[test]
fn a_page_goes_the_whole_round() {
    let mut world = World::new();
    world.fill(5);
    world.donate(9, 5).unwrap();
    assert_eq!(world.host.state(Pfn::new(5)), HostPage::NoPage(owner(9)));
    assert_eq!(world.byte(5), 0xaa, "donation preserves");
    let donated = world.picture();
    world.share(9).unwrap();
    assert_eq!(world.host.state(Pfn::new(5)), HostPage::SharedBorrowed);
    assert_eq!(world.guest.table.page(Gfn::new(9)).unwrap().state, PageState::SharedOwned);
    world.unshare(9).unwrap();
    assert_eq!(world.picture(), donated, "share and unshare leave no trace");
    assert_eq!(world.byte(5), 0xaa);
    world.guest.life = Life::Dying;
    world.reclaim(9).unwrap();
    assert_eq!(world.host.state(Pfn::new(5)), HostPage::Owned);
    assert_eq!(world.byte(5), 0, "a private page is zeroed");
    assert_eq!((world.host.table.nr_tables(), world.guest.table.nr_tables()), (1, 1));
}

#[test]
fn donate_looks_in_pkvms_order() {
    let mut world = World::with_tables(usize::MAX, 3);
    world.donate(0, 0).unwrap();
    world.poison(1);
    // Everything is wrong: the guest is dying.
    world.guest.life = Life::Dying;
    world.refuses(Errno::EINVAL, |w| w.donate(99, 99));
    world.guest.life = Life::Gone;
    world.refuses(Errno::EINVAL, |w| w.donate(99, 99));
    world.guest.life = Life::Alive;
    // No memory comes before no guest address.
    world.refuses(Errno::EPERM, |w| w.donate(99, NR_FRAMES));
    world.refuses(Errno::EPERM, |w| w.donate(99, u64::MAX - 1));
    world.refuses(Errno::EINVAL, |w| w.donate(99, u64::MAX));
    let across = run(99, NR_FRAMES - 1, 2);
    world.refuses(Errno::EINVAL, |w| w.parties().host_donate_guest(across));
    // The host's state comes before the guest's.
    world.refuses(Errno::EPERM, |w| w.donate(99, 0));
    world.refuses(Errno::ERANGE, |w| w.donate(99, 1));
    world.refuses(Errno::EPERM, |w| w.donate(0, 1));
    world.refuses(Errno::EPERM, |w| w.donate(1, 1));
    // Memory for tables comes last.
    world.refuses(Errno::ENOMEM, |w| w.donate(63, 1));
    world.donate(2, 1).unwrap();
    world.share(0).unwrap();
    world.refuses(Errno::EPERM, |w| w.donate(3, 0));
}

#[test]
fn a_block_of_the_guest_is_in_the_way_of_a_donation() {
    let mut world = World::new();
    world.leaf(4, Level::BLOCK_2M, 8, PageState::Owned);
    world.refuses(Errno::EPERM, |w| w.donate(5, 1));
}

#[test]
fn donating_a_run_is_all_or_nothing() {
    let mut world = World::new();
    world.donate(7, 20).unwrap();
    world.refuses(Errno::EPERM, |w| w.parties().host_donate_guest(run(4, 0, 4)));
    world.refuses(Errno::EPERM, |w| w.parties().host_donate_guest(run(8, 17, 4)));
    world.refuses(Errno::ERANGE, |w| w.parties().host_donate_guest(run(60, 0, 5)));
    let mut tight = World::with_tables(usize::MAX, 4);
    tight.refuses(Errno::ENOMEM, |w| w.parties().host_donate_guest(run(2, 0, 8)));
    let mut tight = World::with_tables(3, usize::MAX);
    tight.refuses(Errno::ENOMEM, |w| w.parties().host_donate_guest(run(2, 0, 8)));
    world.parties().host_donate_guest(run(8, 0, 16)).unwrap();
    assert_eq!(world.host.taken().count(), 17);
}

#[test]
fn share_looks_in_pkvms_order() {
    let mut world = World::new();
    world.poison(0);
    world.leaf(4, Level::BLOCK_2M, 8, PageState::Owned);
    world.refuses(Errno::ERANGE, |w| w.share(64));
    world.refuses(Errno::EHWPOISON, |w| w.share(0));
    world.refuses(Errno::ENOENT, |w| w.share(1));
    world.refuses(Errno::E2BIG, |w| w.share(5));
    // Neither the guest's state nor the host's is right.
    world.leaf(1, Level::PAGE, 1, PageState::SharedBorrowed);
    world.refuses(Errno::EPERM, |w| w.share(1));
    // Only the host's is wrong: it has the page as its own.
    world.leaf(2, Level::PAGE, 2, PageState::Owned);
    world.refuses(Errno::EPERM, |w| w.share(2));
    // Or as somebody else's.
    world.host.set_donated(Pfn::new(2), owner(3)).unwrap();
    world.refuses(Errno::EPERM, |w| w.share(2));
    world.donate(3, 3).unwrap();
    world.share(3).unwrap();
    world.refuses(Errno::EPERM, |w| w.share(3));
}

#[test]
fn unshare_looks_in_pkvms_order() {
    let mut world = World::new();
    world.poison(0);
    world.leaf(4, Level::BLOCK_2M, 8, PageState::SharedOwned);
    world.refuses(Errno::ERANGE, |w| w.unshare(u64::MAX));
    world.refuses(Errno::EHWPOISON, |w| w.unshare(0));
    world.refuses(Errno::ENOENT, |w| w.unshare(1));
    world.refuses(Errno::E2BIG, |w| w.unshare(7));
    world.donate(1, 1).unwrap();
    world.refuses(Errno::EPERM, |w| w.unshare(1));
    world.leaf(2, Level::PAGE, 2, PageState::SharedOwned);
    world.refuses(Errno::EPERM, |w| w.unshare(2));
}

#[test]
fn reclaim_looks_in_pkvms_order() {
    let mut world = World::new();
    world.poison(0);
    world.leaf(4, Level::BLOCK_2M, 8, PageState::Owned);
    world.leaf(1, Level::PAGE, 1, PageState::SharedBorrowed);
    world.donate(2, 2).unwrap();
    world.donate(3, 3).unwrap();
    world.share(3).unwrap();
    world.fill(2);
    world.fill(3);
    for gfn in [0, 1, 2, 3, 5, 9, 64, u64::MAX] {
        world.refuses(Errno::EINVAL, |w| w.reclaim(gfn));
    }
    world.guest.life = Life::Dying;
    world.refuses(Errno::ERANGE, |w| w.reclaim(64));
    world.refuses(Errno::ENOENT, |w| w.reclaim(9));
    world.refuses(Errno::E2BIG, |w| w.reclaim(5));
    world.refuses(Errno::EPERM, |w| w.reclaim(1));
    let before = world.picture();
    assert_eq!(world.reclaim(0), Ok(()), "a destroyed page is back already");
    assert_eq!(world.picture(), before);
    world.reclaim(2).unwrap();
    world.reclaim(3).unwrap();
    assert_eq!(
        (world.byte(2), world.byte(3)),
        (0, 0xaa),
        "zeroed, and not: the host saw it anyway"
    );
    world.refuses(Errno::ENOENT, |w| w.reclaim(2));
}

const YES: fn(Gfn) -> bool = |_| true;
const NO: fn(Gfn) -> bool = |_| false;

#[test]
fn hooks_do_what_is_left_to_do() {
    let mut world = World::new();
    world.donate(1, 1).unwrap();
    world.donate(2, 2).unwrap();
    world.share(2).unwrap();
    let runs = [run(0, 0, 4), run(8, 8, 2)];
    // Page 1 is the guest's, page 2 shared by it, the others the host's.
    world.refuses(Errno::EPERM, |w| w.parties().make_private(&runs, NO));
    world.parties().make_private(&runs, |gfn| gfn == Gfn::new(2)).unwrap();
    assert!(world.host.taken().all(|(_, page)| matches!(page, HostPage::NoPage(_))));
    assert_eq!(world.host.taken().count(), 6);
    let before = world.picture();
    world.parties().make_private(&runs, NO).unwrap();
    assert_eq!(world.picture(), before, "nothing to do");
    world.refuses(Errno::EPERM, |w| w.parties().make_shared(&runs, |gfn| gfn != Gfn::new(9)));
    world.parties().make_shared(&runs, YES).unwrap();
    world.parties().make_shared(&runs, NO).unwrap();
    assert!(world.host.taken().all(|(_, page)| page == HostPage::SharedBorrowed));
}

#[test]
fn sharing_what_the_guest_never_had_is_nothing() {
    let mut world = World::new();
    let before = world.picture();
    world.parties().make_shared(&[run(0, 0, 16)], NO).unwrap();
    assert_eq!(world.picture(), before);
    assert_eq!((world.host.table.nr_tables(), world.guest.table.nr_tables()), (1, 1));
}

#[test]
fn hooks_check_every_page_before_they_touch_one() {
    let mut world = World::with_tables(usize::MAX, 6);
    world.donate(20, 20).unwrap();
    let cases = [
        (vec![run(0, 0, 4), run(4, 20, 1)], Errno::EPERM),
        (vec![run(0, 0, 4), run(20, 4, 1)], Errno::EPERM),
        (vec![run(0, 0, 4), run(4, NR_FRAMES, 1)], Errno::EPERM),
        (vec![run(0, 0, 4), run(4, NR_FRAMES - 1, 2)], Errno::EINVAL),
        (vec![run(0, 0, 4), run(62, 4, 3)], Errno::ERANGE),
        (vec![run(0, 0, 4), run(u64::MAX, 4, 1)], Errno::ERANGE),
        (vec![run(0, 0, 4), run(8, 4, u64::MAX)], Errno::EINVAL),
        (vec![run(0, 0, 4), run(3, 8, 1)], Errno::EINVAL),
        (vec![run(0, 0, 4), run(8, 3, 1)], Errno::EINVAL),
        (vec![run(8, 3, 1), run(0, 0, 4)], Errno::EINVAL),
        (vec![run(0, 0, 16), run(48, 24, 1)], Errno::ENOMEM),
    ];
    for (runs, errno) in cases {
        world.refuses(errno, |w| w.parties().make_private(&runs, YES));
    }
    world.parties().make_private(&[run(u64::MAX, u64::MAX, 0)], YES).unwrap_err();
    world.parties().make_private(&[], YES).unwrap();
}

#[test]
fn a_living_guest_gives_nothing_back() {
    let mut world = World::new();
    let arena = Arc::clone(&world.arena);
    world.donate(1, 1).unwrap();
    world.donate(2, 2).unwrap();
    world.share(2).unwrap();
    world.fill(1);
    for gfn in [1, 2] {
        let runs = [run(8, 8, 2), run(gfn, gfn, 1)];
        world.refuses(Errno::EBUSY, |w| w.parties().reclaim(&runs, &arena));
    }
    world.parties().reclaim(&[run(8, 8, 2), run(3, 3, 1)], &arena).unwrap();
    world.parties().reclaim(&[run(1, 9, 1)], &arena).unwrap();
    world.guest.life = Life::Dying;
    world.parties().reclaim(&[run(0, 0, 8)], &arena).unwrap();
    assert_eq!(world.host.taken().count(), 0);
    assert_eq!(world.byte(1), 0);
}
