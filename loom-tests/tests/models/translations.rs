//! A vCPU's accesses by what it remembers, while the page is taken from the guest or from the host. EL2 is the library's own,
//! on a machine of some frames.
//!
//! Judges: a frame's cell, at which whoever has the frame now races with whoever had it before; EL2's own rules in the end,
//! stale translations among them.

use std::sync::Arc;

use gmem::addr::{Gfn, Pfn, Pgoff};
use gmem::modelled::Flaw;
use gmem::modelled_el2::{Guest, Idx, Kind, OnCpu, Vcpu, Watched, Word, World};
use loom::thread;
use loom_tests::{Memory, explore, must_notice};

use crate::RACE;

/// The frame that changes hands, and where the guest has it. In models a TLB has two lines, so the two pages take the same.
const FRAME: Pfn = Pfn::new(1);
const AT: Gfn = Gfn::new(0);
const OTHER_FRAME: Pfn = Pfn::new(2);
const OTHER: Gfn = Gfn::new(2);

const SECRET: Word = Word(7);
const HOST: Word = Word(3);
const NOTHING: Word = Word(0);
const NR_FRAMES: u64 = 8;

/// What the rules say when something stale is remembered.
const STALE: &str = "19 what is remembered";

struct Bytes(Memory);

impl Watched for Bytes {
    fn load(&self, frame: Pfn) -> u64 {
        self.0.read(Pgoff::new(frame.get()))
    }

    fn store(&self, frame: Pfn, word: u64) {
        self.0.write(Pgoff::new(frame.get()), word);
    }
}

/// A guest that has used its page, with the vCPU on the first CPU.
struct Scene {
    world: World,
    bytes: Arc<Bytes>,
    guest: Guest,
}

impl Scene {
    fn new(kind: Kind) -> Arc<Self> {
        let bytes = Arc::new(Bytes(Memory::new(NR_FRAMES, 0)));
        let world = World::new(bytes.clone()).unwrap();
        let guest = world.vm(kind).unwrap();
        world.load(OnCpu(0), guest, Idx::First).unwrap();
        for (frame, at) in [(FRAME, AT), (OTHER_FRAME, OTHER)] {
            match kind {
                Kind::Protected => world.donate(OnCpu(0), frame, at).unwrap(),
                Kind::NotProtected => world.share(OnCpu(0), frame, at).unwrap(),
            }
        }
        assert!(world.store(OnCpu(0), AT, SECRET));
        Arc::new(Self { world, bytes, guest })
    }

    /// Its vCPU stores by what it remembers.
    fn hit(&self, vcpu: &Vcpu, at: Gfn) -> Option<()> {
        vcpu.hit(at, |frame| self.bytes.store(frame, SECRET.0))
    }

    /// And if that is nothing, by the tables.
    fn hit_or_walk(&self, vcpu: &Vcpu, at: Gfn) -> Option<()> {
        self.hit(vcpu, at).or_else(|| vcpu.walk(at, |frame| self.bytes.store(frame, SECRET.0)))
    }

    fn sound(&self) {
        assert_eq!(self.world.check(), Vec::<String>::new());
    }
}

/// The vCPU runs on a thread of its own while `host` takes the page; afterwards it must find nothing there.
fn while_it_runs(scene: &Arc<Scene>, host: impl FnOnce(&World, Guest)) {
    let vcpu = scene.world.vcpu(OnCpu(0)).unwrap();
    let running = {
        let scene = Arc::clone(scene);
        thread::spawn(move || {
            scene.hit_or_walk(&vcpu, AT);
            vcpu
        })
    };
    host(&scene.world, scene.guest);
    let vcpu = running.join().unwrap();
    assert_eq!(scene.hit_or_walk(&vcpu, AT), None, "it still reaches the page");
    scene.sound();
}

/// The host hides a page of its own from the guest and uses it.
fn unshared() {
    let scene = Scene::new(Kind::NotProtected);
    while_it_runs(&scene, |world, guest| {
        world.unshare(OnCpu(1), guest, AT).unwrap();
        assert!(world.user_store(OnCpu(1), FRAME, HOST));
    });
    assert_eq!(scene.bytes.load(FRAME), HOST.0);
}

/// The guest dies, and the host takes its page back, cleared.
fn reclaimed() {
    let scene = Scene::new(Kind::Protected);
    while_it_runs(&scene, |world, guest| {
        world.put(OnCpu(0)).unwrap();
        world.start_teardown(OnCpu(1), guest).unwrap();
        world.reclaim(OnCpu(1), guest, AT).unwrap();
        assert_eq!(world.user_load(OnCpu(1), FRAME), Some(NOTHING), "a secret");
    });
    assert_eq!(scene.bytes.load(FRAME), 0);
}

/// The host's kernel takes a page by force.
fn destroyed() {
    let scene = Scene::new(Kind::Protected);
    while_it_runs(&scene, |world, _| {
        assert_eq!(world.kernel_load(OnCpu(1), FRAME), Some(NOTHING), "a secret");
        assert!(world.user_store(OnCpu(1), FRAME, HOST));
    });
    assert_eq!(scene.bytes.load(FRAME), HOST.0);
}

/// The same while another page takes the line: nothing is left there to be forgotten.
fn destroyed_when_evicted() {
    let scene = Scene::new(Kind::Protected);
    let vcpu = scene.world.vcpu(OnCpu(0)).unwrap();
    let other = vcpu.another();
    let running = {
        let scene = Arc::clone(&scene);
        thread::spawn(move || scene.hit(&vcpu, AT))
    };
    assert!(other.walk(OTHER, |_| ()).is_some());
    assert_eq!(scene.world.kernel_load(OnCpu(1), FRAME), Some(NOTHING), "a secret");
    running.join().unwrap();
    assert_eq!(scene.hit(&other, AT), None);
    scene.sound();
}

/// The same while the vCPU goes by way of its CPU.
fn destroyed_beside_a_walk() {
    let scene = Scene::new(Kind::Protected);
    let running = {
        let scene = Arc::clone(&scene);
        thread::spawn(move || scene.world.store(OnCpu(0), AT, SECRET))
    };
    assert_eq!(scene.world.kernel_load(OnCpu(1), FRAME), Some(NOTHING), "a secret");
    running.join().unwrap();
    scene.sound();
}

/// The guest hides a page that it has shown, and puts a secret there; the host stores while it may.
fn hidden() {
    let scene = Scene::new(Kind::Protected);
    assert!(scene.world.show(OnCpu(0), AT));
    assert!(scene.world.user_store(OnCpu(1), FRAME, HOST));
    let vcpu = scene.world.vcpu(OnCpu(0)).unwrap();
    let running = {
        let scene = Arc::clone(&scene);
        thread::spawn(move || {
            assert!(scene.world.hide(OnCpu(0), AT));
            scene.hit_or_walk(&vcpu, AT).expect("its own");
        })
    };
    scene.world.user_store(OnCpu(1), FRAME, HOST);
    running.join().unwrap();
    assert_eq!(scene.bytes.load(FRAME), SECRET.0);
    assert_eq!(scene.world.user_load(OnCpu(1), FRAME), None);
    scene.sound();
}

/// Proves: the host that uses a page which it has hidden from a guest has it alone.
#[test]
fn unshare_and_access() {
    explore(unshared);
}

/// Proves: a page of a dying guest is cleared when nobody writes there any more, whoever still has a vCPU of it.
#[test]
fn reclaim_and_access() {
    explore(reclaimed);
}

/// Proves: so it is with a page that is taken by force, and the guest does not get it again.
#[test]
fn force_and_access() {
    explore(destroyed);
}

/// Proves: a translation that made way for another is waited for, too.
#[test]
fn force_and_evicted_access() {
    explore(destroyed_when_evicted);
}

/// Proves: a walk leaves nothing behind that was forgotten while it was under way.
#[test]
fn force_and_walk() {
    explore(destroyed_beside_a_walk);
}

/// Proves: what a guest has hidden, the host does not reach by what its CPUs remember.
#[test]
fn hiding_and_host_access() {
    explore(hidden);
}

/// Seed: translations are forgotten, and nobody waits.
#[test]
fn canary_forgets_without_waiting() {
    for model in [unshared, reclaimed, destroyed, destroyed_when_evicted] {
        must_notice(Flaw::ForgetsWithoutWaiting, RACE, &[2], move |_| model());
    }
}

/// Seed: the vCPU is out of its section when it copies.
#[test]
fn canary_leaves_before_the_copy() {
    for model in [unshared, reclaimed, destroyed] {
        must_notice(Flaw::LeavesBeforeTheCopy, RACE, &[2], move |_| model());
    }
}

/// Seed: neither side runs a fence.
#[test]
fn canary_sections_without_fences() {
    for model in [unshared, reclaimed, destroyed] {
        must_notice(Flaw::SectionsWithoutFences, RACE, &[2], move |_| model());
    }
}

/// Seed: a translation that made way passes for one that nobody uses.
#[test]
fn canary_evicts_in_silence() {
    must_notice(Flaw::EvictsInSilence, RACE, &[2], |_| destroyed_when_evicted());
}

/// Seed: what a walk has found is remembered when the lock is gone.
#[test]
fn canary_remembers_old_news() {
    must_notice(Flaw::RemembersOldNews, STALE, &[2], |_| destroyed_beside_a_walk());
}
