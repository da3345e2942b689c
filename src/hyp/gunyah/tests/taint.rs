//! What one VM wrote reaches another by a share, a loan or a gift, by the known weak point, and in no other way: the
//! judge of random VMs says so, and notices what it must.

use super::super::aspace::Piece;
use super::super::hostile::taint::Taint;
use super::super::rm::message::{Create, Transfer};
use super::full::*;
use super::*;

/// A loan to a guest that stores something there.
fn lent(transfer: Transfer) -> (Full, u32, Taint) {
    let full = Full::small();
    let mut members = vec![(A, 7)];
    if transfer == Transfer::Share {
        members.push((HOST, 4));
    }
    let create = Create { transfer, ..lend(&members, &[(RAM + 5, 1)]) };
    let handle = full.create(HOST, &create).unwrap();
    full.accept(A, &take(handle, transfer)).unwrap();
    let mut taint = Taint::default();
    taint.store(Pfn::new(RAM + 5), 7, A, &full.picture());
    let now = full.picture();
    assert_eq!(taint.moved(&now, &now), Ok(()));
    (full, handle, taint)
}

#[test]
fn who_was_given_it_may_read_it_and_nobody_else() {
    let pfn = Pfn::new(RAM + 5);
    for transfer in [Transfer::Lend, Transfer::Share] {
        let (_, _, taint) = lent(transfer);
        assert_eq!(taint.load(pfn, 7, A), Ok(()));
        assert_eq!(taint.load(pfn, 7, HOST).is_ok(), transfer == Transfer::Share);
        assert!(taint.load(pfn, 7, B).is_err());
        assert!(taint.load(pfn, 8, A).is_err(), "not what is there");
        assert!(taint.load(pfn, 0, A).is_err(), "nobody asked for zeroes");
        assert!(taint.load(Pfn::new(RAM + 6), 7, A).is_err(), "nothing was stored there");
        assert_eq!(taint.load(Pfn::new(RAM + 6), 0, B), Ok(()));
    }
}

#[test]
fn what_comes_back_as_it_was_is_counted_and_zeroes_are_not() {
    for (flags, nr) in [(0, 1), (1, 0)] {
        let (full, handle, mut taint) = lent(Transfer::Lend);
        full.release(A, handle, 0).unwrap();
        let before = full.picture();
        full.reclaim(HOST, handle, flags).unwrap();
        if flags == 1 {
            taint.clear(&[Pfn::new(RAM + 5)]);
        }
        assert_eq!(taint.moved(&before, &full.picture()), Ok(()));
        assert_eq!(taint.nr_returned, nr);
        assert_eq!(taint.load(Pfn::new(RAM + 5), if flags == 1 { 0 } else { 7 }, HOST), Ok(()));
    }
    // What was shared with the owner is no secret that comes back.
    let (full, handle, mut taint) = lent(Transfer::Share);
    full.release(A, handle, 0).unwrap();
    let before = full.picture();
    full.reclaim(HOST, handle, 0).unwrap();
    assert_eq!((taint.moved(&before, &full.picture()), taint.nr_returned), (Ok(()), 0));
}

#[test]
fn whoever_can_read_what_was_not_given_is_noticed() {
    for vmid in [HOST, B] {
        let (full, _, mut taint) = lent(Transfer::Lend);
        let before = full.picture();
        full.gunyah.with(|world| {
            let home = world.rm.vms[&vmid].home.unwrap();
            let space = world.hyp.aspaces.get_mut(&home.aspace).unwrap();
            let piece = Piece { gfn: Gfn::new(RAM + 5), pfn: Pfn::new(RAM + 5), nr: 1 };
            space.map(home.aspace, &mut world.hyp.heap, piece, R, &mut Vec::new()).unwrap();
        });
        assert!(taint.moved(&before, &full.picture()).is_err(), "{vmid:?}");
    }
}

#[test]
fn a_number_that_is_used_again_is_another_vms() {
    let (full, handle, mut taint) = lent(Transfer::Lend);
    let before = full.picture();
    full.reset(A);
    full.gunyah.with(|world| world.rm.deallocate(HOST, A)).unwrap();
    let gone = full.picture();
    assert_eq!(taint.moved(&before, &gone), Ok(()));
    full.reclaim(HOST, handle, 0).unwrap();
    let home = full.picture();
    assert_eq!(taint.moved(&gone, &home), Ok(()));
    full.gunyah.with(|world| world.rm.allocate(HOST, A)).unwrap();
    assert_eq!(taint.moved(&home, &full.picture()), Ok(()));
    assert!(taint.load(Pfn::new(RAM + 5), 7, A).is_err());
    assert_eq!(taint.load(Pfn::new(RAM + 5), 7, HOST), Ok(()));
}
