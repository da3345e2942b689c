//! The rules about memory on demand can be broken, and say so.

use super::*;
use crate::hyp::gunyah::World;
use crate::hyp::gunyah::aspace::Piece;

/// A page that is lent, one that is shared, and something done to them behind everybody's back.
fn told_of(spoil: impl FnOnce(&mut World)) -> Vec<String> {
    let scene = Scene::new();
    let mut guest = scene.guest();
    guest.provide(&[run(0x100, 3, 2)], Side::Lent, true, &mut || ()).unwrap();
    guest.provide(&[run(0x200, 5, 2)], Side::Shared, true, &mut || ()).unwrap();
    scene.sound(&[&guest]);
    scene.gunyah.with(spoil);
    let told = scene.gunyah.check();
    // Its end would be compared with what it should have been.
    std::mem::forget(guest);
    told
}

/// What is said when the rule of this name is broken.
pub(in crate::hyp::gunyah) fn broken(name: &str) -> Vec<String> {
    told_of(|world| match name.split(' ').next().unwrap() {
        "52" => world.kernel.show(crate::range::PfnRange::new(Pfn::new(4), 1).unwrap()),
        "52b" => {
            let host = world.rm.vms[&Vmid::HLOS].home.unwrap().aspace;
            let space = world.hyp.aspaces.get_mut(&host).unwrap();
            let piece = Piece { gfn: Gfn::new(6), pfn: Pfn::new(6), nr: 1 };
            space.unmap(host, &mut world.hyp.heap, piece, &mut Vec::new()).unwrap();
        }
        other => panic!("no way to break rule {other}"),
    })
}

type Spoil = fn(&mut World);

#[test]
fn what_is_lent_nobody_of_the_hosts_has() {
    let all: [(Spoil, &str); 3] = [
        (|world| world.kernel.note_use(Pfn::new(3), |uses| uses.nr_mapped += 1), "mapped"),
        (|world| world.kernel.note_use(Pfn::new(4), |uses| uses.nr_pinned += 1), "pinned"),
        (
            |world| world.kernel.show(crate::range::PfnRange::new(Pfn::new(3), 2).unwrap()),
            "direct map",
        ),
    ];
    for (spoil, wrong) in all {
        let told = told_of(spoil);
        assert!(!told.is_empty(), "{wrong}");
        assert!(
            told.iter().all(|told| told.starts_with("52 ") && told.contains(wrong)),
            "{told:?}"
        );
    }
    // What is shared user space may have.
    let fine = told_of(|world| world.kernel.note_use(Pfn::new(5), |uses| uses.nr_mapped += 1));
    assert_eq!(fine, [""; 0]);
}
