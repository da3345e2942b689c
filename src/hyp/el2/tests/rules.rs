//! Every rule can be broken, and says so; and memory costs what it should.

use std::collections::BTreeMap;

use super::*;
use crate::hyp::el2::host_mmu::Owner;
use crate::hyp::el2::invariants::trace::{Kind, STEP_RULES, Step};
use crate::hyp::el2::invariants::{Books, HOST_RULES, RULES};
use crate::hyp::el2::tlb::Translation;
use crate::hyp::el2::{GuestPage, hyp_page::HypPage};
use crate::stage2::{Leaf, PageState, Prot};

/// A world with a page of each kind.
struct Scene {
    world: World,
    pvm: Guest,
    np: Guest,
}

const PRIVATE: u64 = GUEST;
const SHOWN: u64 = GUEST + 1;
const LENT: u64 = GUEST + 2;
const SECURE: u64 = GUEST + 3;
const PLAIN: u64 = GUEST + 4;
/// Where the protected guest had a page that was destroyed.
const DESTROYED: u64 = 0x15;

impl Scene {
    fn new() -> Self {
        let world = World::new();
        let pvm = world.running(true);
        world.donate(PRIVATE, 0x10).unwrap();
        world.donate(SHOWN, 0x11).unwrap();
        assert_eq!(world.hvc(MEM_SHARE, 0x11), DONE);
        world.donate(PLAIN + 1, DESTROYED).unwrap();
        world.call(HostCall::ForceReclaimGuestPage, [(PLAIN + 1) << 12, 0, 0, 0]).unwrap();
        world.put(0);
        let np = world.running(false);
        world.share(LENT, 0x10, 1).unwrap();
        world.el2.ffa_share(SECURE, 1).unwrap();
        world.user_store(PLAIN, b"host").unwrap();
        world.sound();
        Self { world, pvm, np }
    }

    fn record(&self, pfn: u64, change: impl FnOnce(&mut HypPage)) {
        self.world.el2.host.lock().pages.update(Pfn::new(pfn), change);
    }

    fn map(&self, guest: Guest, gfn: u64, pfn: u64, state: PageState, prot: Prot) {
        let vms = self.world.el2.vms.lock();
        let mut memcache = Vec::new();
        let mut mmu = vms.get(guest.handle as u16).unwrap().vm.mmu.lock();
        let leaf = Leaf { pfn: Pfn::new(pfn), prot, state };
        mmu.map(Gfn::new(gfn), Level::PAGE, leaf, &mut memcache).unwrap();
    }

    fn give(&self, pfn: u64, owner: Owner) {
        let mut host = self.world.el2.host.lock();
        host.give(Pages::new(Pfn::new(pfn), 1), owner, Level::PAGE).unwrap();
    }
}

use crate::stage2::Level;

/// What breaks a rule, by the number that its name begins with.
fn breaks(name: &str, scene: &Scene) {
    let owner = |gfn| GuestPage { handle: scene.pvm.handle as u16, gfn: Gfn::new(gfn) };
    let el2 = &scene.world.el2;
    match name.split([' ', ',']).next().unwrap() {
        "1" => scene.record(PRIVATE, |page| page.set_host(State::Owned)),
        "1b" => scene.record(PLAIN, |page| page.set_hyp(State::Owned)),
        "2" => scene.give(PRIVATE, Owner::Hyp),
        "4" => scene.record(PLAIN, |page| page.set_host(State::NoPage)),
        "5" => scene.give(PRIVATE, Owner::Guest(owner(0x99))),
        "6" => scene.map(scene.pvm, 0x11, SHOWN, PageState::Owned, Prot::RWX),
        "7" => scene.record(SECURE, |page| page.nr_pins = 1),
        "8" => scene.record(LENT, |page| page.nr_guests = 2),
        "9" => scene.map(scene.pvm, 0x12, PRIVATE, PageState::Owned, Prot::RWX),
        "10" => scene.map(scene.pvm, 0x10, PRIVATE, PageState::SharedOwned, Prot::R),
        "11" => {
            // Half a block is the host's alone.
            scene.world.share(GUEST + 512, 0x200, 512).unwrap();
            scene.record(GUEST + 512 + 9, |page| page.set_host(State::Owned));
        }
        "12" => scene.record(NO_MAP, |page| page.set_host(State::SharedOwned)),
        "19" => {
            let to = Translation { pfn: Pfn::new(PRIVATE), prot: Prot::RWX };
            el2.host.lock().tlbs.fill(2, Gfn::new(PRIVATE), to);
        }
        "33" => {
            let table = el2.host.lock().tree.table_frames().last().unwrap();
            scene.record(table.get(), |page| page.set_hyp(State::NoPage));
        }
        "29" => {
            let vms = el2.vms.lock();
            let mut mmu = vms.get(scene.pvm.handle as u16).unwrap().vm.mmu.lock();
            mmu.pool.push(Pfn::new(PLAIN));
        }
        "32" => drop(el2.cpus[0].lock().loaded.take()),
        "34" => scene.record(scene.np.kvm >> 12, |page| page.nr_pins = 0),
        _ => scene.record(LENT, |page| page.nr_guests = 7),
    }
}

#[test]
fn every_rule_says_when_it_is_broken() {
    for (name, _) in RULES {
        let scene = Scene::new();
        breaks(name, &scene);
        let told = scene.world.el2.check();
        assert!(told.iter().any(|told| told.starts_with(name)), "{name}: {told:#?}");
    }
}

/// What breaks a rule about a step, by its number; and what kind of step it was.
fn breaks_in_a_step(name: &str, scene: &Scene) -> Kind {
    let write = |pfn: u64| scene.world.el2.machine().write(Pa::new(pfn << 12), b"else").unwrap();
    let owner = GuestPage { handle: scene.pvm.handle as u16, gfn: Gfn::new(0x77) };
    match name.split([' ', ',']).next().unwrap() {
        "14" => {
            scene.record(PLAIN, |page| page.nr_pins = 1);
            return Kind::Refused;
        }
        "17" => [PLAIN, PLAIN + 3].into_iter().for_each(|pfn| scene.record(pfn, |p| p.nr_pins = 1)),
        "18" => scene.record(PLAIN, |page| page.set_host(State::SharedBorrowed)),
        "22" => {
            write(PRIVATE);
            scene.record(PRIVATE, |page| page.set_host(State::Owned));
        }
        "24" => write(PRIVATE),
        "25" => {
            scene.give(PLAIN, Owner::Guest(owner));
            write(PLAIN);
        }
        "26" => scene.map(scene.pvm, DESTROYED, PLAIN, PageState::Owned, Prot::RWX),
        "38" => return Kind::HostReached(Pfn::new(PRIVATE)),
        _ => panic!("nothing breaks {name}"),
    }
    Kind::Done
}

#[test]
fn every_rule_about_steps_says_when_it_is_broken() {
    for (name, rule) in STEP_RULES {
        let scene = Scene::new();
        let before = Snapshot::of(&scene.world.el2);
        let step = |after: &Snapshot, kind| {
            rule(Step { before: &before, after, el2: &scene.world.el2, kind })
        };
        for kind in [Kind::Done, Kind::Refused, Kind::RefusedAfterRefill, Kind::Many] {
            assert_eq!(step(&before, kind), None, "{name}: nothing happened");
        }
        let kind = breaks_in_a_step(name, &scene);
        assert!(step(&Snapshot::of(&scene.world.el2), kind).is_some(), "{name}");
    }
}

#[test]
fn a_refill_explains_what_el2_took_and_no_more() {
    let scene = Scene::new();
    let el2 = &scene.world.el2;
    let refused = |what: &dyn Fn()| {
        let before = Snapshot::of(el2);
        what();
        let after = Snapshot::of(el2);
        let kind = Kind::RefusedAfterRefill;
        Step { before: &before, after: &after, el2, kind }.wrong()
    };
    scene.world.top_up(scene.np, 0, 3);
    let refill = || assert!(scene.world.share(DEVICE, 0x55, 1).is_err());
    assert_eq!(refused(&refill), None);
    let wrote = || el2.machine().write(Pa::new(PLAIN << 12), b"else").unwrap();
    assert!(refused(&wrote).is_some());
    assert!(refused(&|| scene.record(PLAIN, |page| page.nr_guests = 1)).is_some());
}

/// What the host of a scene would rightly believe.
fn books(scene: &Scene) -> Books {
    let handle = scene.pvm.handle as u16;
    let page = |gfn| GuestPage { handle, gfn: Gfn::new(gfn) };
    let given = [(0x10, PRIVATE), (0x11, SHOWN), (DESTROYED, PLAIN + 1)];
    let given: BTreeMap<_, _> =
        given.into_iter().map(|(gfn, pfn)| (page(gfn), Pfn::new(pfn))).collect();
    let pins = given.values().map(|&pfn| (pfn, 1)).collect();
    let borrowed = [SHOWN, LENT, SECURE, PLAIN].map(Pfn::new).to_vec();
    Books { nr_locked: Some(3), pins: Some(pins), given, borrowed }
}

#[test]
fn every_rule_of_the_hosts_says_when_it_is_broken() {
    for (name, _) in HOST_RULES {
        let number = name.split(' ').next().unwrap();
        let scene = Scene::new();
        let mut books = books(&scene);
        let told = |books: &Books| scene.world.el2.check_books(books, &[number]);
        if number == "39" {
            // In this scene a page was destroyed on purpose.
            assert!(!told(&books).is_empty(), "{name}");
            assert_eq!(World::new().el2.check_books(&Books::default(), &[number]), [""; 0]);
            continue;
        }
        assert_eq!(told(&books), Vec::<String>::new());
        match number {
            "28" => {
                let mut wrong = books.clone();
                wrong.given.pop_first();
                assert!(!told(&wrong).is_empty(), "{name}: one is not in the books");
                // A host may have no pins and no limit to tell of.
                (wrong.given, wrong.pins, wrong.nr_locked) = (books.given.clone(), None, None);
                assert_eq!(told(&wrong), Vec::<String>::new());
                wrong.nr_locked = Some(4);
                assert!(!told(&wrong).is_empty(), "{name}: one more is locked");
                books.pins.as_mut().unwrap().insert(Pfn::new(PLAIN), 1);
                assert!(!told(&books).is_empty(), "{name}");
                let page = *books.given.keys().next().unwrap();
                books = self::books(&scene);
                books.given.insert(page, Pfn::new(PLAIN));
            }
            "31" => scene.world.el2.host.lock().pages.orphan(Pages::one(Pfn::new(PRIVATE))),
            "40" => books.borrowed.push(Pfn::new(PRIVATE)),
            _ => panic!("nothing breaks {name}"),
        }
        assert!(!told(&books).is_empty(), "{name}");
    }
}

#[test]
fn memory_that_is_idle_costs_little_and_what_is_given_away_no_more_than_upstream() {
    const GIB: u64 = 1 << 18;
    let frames = PfnRange::new(Pfn::new(GIB), GIB).unwrap();
    let region = Region { frames, kind: RegionKind::Memory, bytes: None };
    let machine = Machine::new(vec![region], None).unwrap();
    let carveout = Pages::new(Pfn::new(2 * GIB - 1024), 1024);
    let el2 = El2::boot(Profile::Mainline72, machine, carveout, 1).unwrap();
    let nr_bytes = || el2.host.lock().nr_bytes() + el2.hyp.lock().nr_bytes();
    // Eight bytes for each frame, and a table for each 2 MiB.
    let upstream = (2 << 20) + 512 * 4096;
    assert!(nr_bytes() * 10 < upstream, "{}", nr_bytes());
    let all = Pages::new(Pfn::new(GIB), GIB - 1024);
    el2.host.lock().give(all, Owner::Hyp, Level::PAGE).unwrap();
    assert!(nr_bytes() * 2 < upstream * 3, "{} and {upstream}", nr_bytes());
}
