use super::*;
use crate::hyp::el2::machine::{Region, RegionKind};
use crate::range::PfnRange;

const MEMORY: u64 = 0x4_0000;

/// Two GiB of memory from the first GiB on, and half a block behind.
fn host(nr_tables: u64) -> HostMmu {
    let frames = PfnRange::new(Pfn::new(MEMORY), 2 * MEMORY + 0x100).unwrap();
    let region = Region { frames, kind: RegionKind::Memory, bytes: None };
    let machine = Arc::new(Machine::new(vec![region], None).unwrap());
    HostMmu::new(machine, FramePool::new(Pages::new(Pfn::new(MEMORY), nr_tables)), 2).unwrap()
}

fn level(host: &HostMmu, pfn: u64) -> (Level, bool) {
    let (level, pte) = host.tree.get(Gfn::new(pfn)).unwrap();
    (level, pte.is_valid())
}

#[test]
fn the_largest_block_of_one_region_is_mapped() {
    let mut host = host(20);
    host.abort(Pfn::new(MEMORY + 7)).unwrap();
    assert_eq!(level(&host, MEMORY), (Level::BLOCK_1G, true));
    host.abort(Pfn::new(3 * MEMORY + 7)).unwrap();
    assert_eq!(level(&host, 3 * MEMORY + 7), (Level::PAGE, true), "memory ends in this block");
    host.abort(Pfn::new(3 * MEMORY + 0x150)).unwrap();
    assert_eq!(level(&host, 3 * MEMORY + 0x150), (Level::PAGE, true), "a device begins in it");
    host.abort(Pfn::new(3 * MEMORY + 0x250)).unwrap();
    assert_eq!(level(&host, 3 * MEMORY + 0x250), (Level::BLOCK_2M, true), "there is a table");
    host.abort(Pfn::new(0)).unwrap();
    assert_eq!(level(&host, 0), (Level::BLOCK_1G, true), "devices have blocks too");
    let prot = |pfn| host.tree.leaf(Gfn::new(pfn)).unwrap().1.prot;
    assert_eq!((prot(0), prot(MEMORY)), (Prot::RW, Prot::RWX));
    host.abort(Pfn::new(1)).unwrap();
    assert_eq!(host.abort(HostMmu::LIMIT), Err(Errno::ERANGE));
    assert_eq!(host.tree.check(), Vec::<String>::new());
}

#[test]
fn what_is_given_away_splits_and_its_neighbours_come_back_when_touched() {
    let mut host = host(20);
    let page = Pages::one(Pfn::new(MEMORY + 0x345));
    host.abort(page.start()).unwrap();
    let guest = GuestPage { handle: 0x1234, gfn: Gfn::new(0x0fff_ffff) };
    for owner in [Owner::Hyp, Owner::Guest(guest)] {
        host.give(page, owner, Level::PAGE).unwrap();
        assert_eq!(host.owner(page.start()), Ok(Some(owner)));
        assert_eq!(host.abort(page.start()), Err(Errno::EPERM));
        if owner == Owner::Hyp {
            let lost = (Level::PAGE, false);
            assert_eq!(level(&host, MEMORY + 0x344), lost, "it went with the block");
        }
        host.abort(Pfn::new(MEMORY + 0x344)).unwrap();
        assert_eq!(level(&host, MEMORY + 0x344), (Level::PAGE, true));
        host.abort(Pfn::new(MEMORY)).unwrap();
        assert_eq!(level(&host, MEMORY), (Level::BLOCK_2M, true));
        host.take_back(page, State::Owned).unwrap();
        assert_eq!(level(&host, MEMORY + 0x345), (Level::PAGE, true), "never merged again");
        assert_eq!(host.owner(page.start()), Ok(None));
    }
    assert_eq!(host.tree.check(), Vec::<String>::new());
}

#[test]
fn devices_give_their_tables_up_when_there_are_no_others() {
    // The root, and three more.
    let mut host = host(4);
    host.abort(Pfn::new(3 * MEMORY + 0x150)).unwrap();
    assert_eq!((host.tree.nr_tables(), host.pool.nr_free()), (4, 0));
    let page = Pages::one(Pfn::new(MEMORY + 0x345));
    host.give(page, Owner::Hyp, Level::PAGE).unwrap();
    assert!(!level(&host, 3 * MEMORY + 0x150).1);
    // None is a device's now.
    let other = Pages::one(Pfn::new(2 * MEMORY + 0x345));
    let before = host.tree.nr_tables();
    assert_eq!(host.give(other, Owner::Hyp, Level::PAGE), Err(Errno::ENOMEM));
    assert_eq!(host.page(other.start()).host(), State::Owned);
    assert_eq!(host.tree.nr_tables(), before);
    host.abort(Pfn::new(2 * MEMORY)).unwrap();
    assert_eq!(host.abort(Pfn::new(3 * MEMORY + 1)), Err(Errno::ENOMEM));
    assert_eq!(host.tree.check(), Vec::<String>::new());
}

#[test]
fn a_cpu_remembers_until_it_is_told() {
    let mut host = host(20);
    let page = Pages::one(Pfn::new(MEMORY + 0x345));
    let found = host.translate(1, page.start()).unwrap();
    assert_eq!(found, Translation { pfn: page.start(), prot: Prot::RWX });
    assert_eq!(host.tlbs.remembered().count(), 1);
    host.give(page, Owner::Hyp, Level::PAGE).unwrap();
    assert_eq!(host.tlbs.remembered().count(), 0);
    assert_eq!(host.translate(1, page.start()), Err(Errno::EPERM));
}
