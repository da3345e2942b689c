//! The order in which EL2 takes its locks: a CPU's own, the VMs' table, the secure world's record, the host's, then EL2's and
//! a guest's. Calls that take several meet; one that takes two the wrong way round is a deadlock, which loom finds.

use std::sync::Arc;

use gmem::addr::{Gfn, Pfn};
use gmem::error::Errno;
use gmem::modelled::Flaw;
use gmem::modelled_el2::{Guest, Idx, Kind, OnCpu, Watched, World};
use loom::thread;
use loom_tests::{explore, must_notice};

const FRAME: Pfn = Pfn::new(1);
const FREE: Pfn = Pfn::new(2);
const AT: Gfn = Gfn::new(0);

/// Nobody looks at bytes here.
struct NoBytes;

impl Watched for NoBytes {
    fn load(&self, _: Pfn) -> u64 {
        0
    }

    fn store(&self, _: Pfn, _: u64) {}
}

/// A guest with a page, on the first CPU; one on the last; and one that dies, without any page.
struct Scene {
    world: World,
    guest: Guest,
    other: Guest,
    dying: Guest,
}

impl Scene {
    fn new() -> Arc<Self> {
        let world = World::new(Arc::new(NoBytes)).unwrap();
        let kinds = [Kind::Protected, Kind::NotProtected, Kind::Protected];
        let [guest, other, dying] = kinds.map(|kind| world.vm(kind).unwrap());
        world.load(OnCpu(0), guest, Idx::First).unwrap();
        world.load(OnCpu(2), other, Idx::First).unwrap();
        world.donate(OnCpu(0), FRAME, AT).unwrap();
        world.start_teardown(OnCpu(0), dying).unwrap();
        Arc::new(Self { world, guest, other, dying })
    }
}

type Call = fn(&Scene);

/// The CPU's, the host's, the guest's.
fn show(scene: &Scene) {
    scene.world.show(OnCpu(0), AT);
}

/// The CPU's, the list's; the host's, EL2's, the list's; the host's, the guest's.
fn donate(scene: &Scene) {
    scene.world.top_up(scene.guest, Idx::First);
    scene.world.donate(OnCpu(0), FREE, Gfn::new(1)).unwrap();
}

/// The CPU's, the VMs'.
fn put_and_load(scene: &Scene) {
    scene.world.put(OnCpu(2)).unwrap();
    scene.world.load(OnCpu(2), scene.other, Idx::Second).unwrap();
}

/// The host's; the VMs', the host's, the guest's; the host's.
fn force(scene: &Scene) {
    scene.world.kernel_load(OnCpu(1), FRAME);
}

/// The VMs', the host's, EL2's, the guest's, the structure's.
fn finalize(scene: &Scene) {
    scene.world.finalize_teardown(OnCpu(1), scene.dying).unwrap();
}

/// The VMs', the host's, the guest's.
fn reclaim(scene: &Scene) {
    let nothing = scene.world.reclaim(OnCpu(1), scene.dying, AT);
    assert_eq!(nothing, Err(Errno::ENOENT));
}

/// The secure world's record, the host's.
fn show_to_the_secure_world(scene: &Scene) {
    scene.world.ffa_share_and_reclaim(Pfn::new(3)).unwrap();
}

/// All of them.
fn check(scene: &Scene) {
    assert_eq!(scene.world.check(), Vec::<String>::new());
}

/// Makes the calls at once.
fn together<const N: usize>(calls: [Call; N]) {
    let scene = Scene::new();
    let [first, others @ ..] = &calls[..] else { return };
    let threads: Vec<_> = others
        .iter()
        .map(|&call| {
            let scene = Arc::clone(&scene);
            thread::spawn(move || call(&scene))
        })
        .collect();
    first(&scene);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    check(&scene);
}

/// Proves: no two of these wait for each other.
#[test]
fn two() {
    let with: [(Call, &[Call]); 5] = [
        (check, &[show, donate, put_and_load, force, finalize, show_to_the_secure_world]),
        (force, &[show, donate, put_and_load, finalize, show_to_the_secure_world]),
        (finalize, &[show, donate, put_and_load, show_to_the_secure_world]),
        (reclaim, &[show, donate, put_and_load, force, check]),
        (donate, &[show, show_to_the_secure_world]),
    ];
    for (one, others) in with {
        others.iter().for_each(|&other| explore(move || together([one, other])));
    }
}

/// Proves: no three of these do, in a ring.
#[test]
fn three() {
    explore(|| together([show, force, finalize]));
    explore(|| together([donate, force, put_and_load]));
    explore(|| together([donate, finalize, show_to_the_secure_world]));
    explore(|| together([check, force, donate]));
}

/// Seed: a call takes the host's lock before that of the VMs.
#[test]
fn canary_locks_in_reverse() {
    must_notice(Flaw::LocksInReverse, "deadlock", &[2], |_| together([force, reclaim]));
    must_notice(Flaw::LocksInReverse, "deadlock", &[2], |_| together([show, force, reclaim]));
}
