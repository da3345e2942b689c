use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::failpoint::arm;
use crate::sync::Mutex;

const fn to(pfn: u64) -> Translation {
    Translation { pfn: Pfn::new(pfn), prot: Prot::RWX }
}

fn gfns(tlbs: &Tlbs) -> Vec<u64> {
    tlbs.remembered().map(|(gfn, _)| gfn.get()).collect()
}

#[test]
fn what_is_invalidated_is_forgotten_by_all_and_nothing_else_is() {
    let mut tlbs = Tlbs::new(2);
    for (who, gfn) in [(0, 1), (0, 2), (1, 2), (1, 130)] {
        tlbs.fill(who, Gfn::new(gfn), to(gfn));
    }
    assert_eq!(tlbs.look_up(1, Gfn::new(2)), None, "130 shares a line with 2");
    assert_eq!(tlbs.look_up(1, Gfn::new(130)), Some(to(130)));
    tlbs.invalidate(Gfn::new(2), 1);
    assert_eq!(gfns(&tlbs), [1, 130]);
    tlbs.invalidate(Gfn::new(0), 130);
    assert_eq!(gfns(&tlbs), [130]);
    tlbs.invalidate(Gfn::new(0), u64::MAX);
    assert!(gfns(&tlbs).is_empty());
    assert_eq!(tlbs.look_up(7, Gfn::new(1)), None);
}

#[test]
fn a_line_tells_what_was_put_there_and_of_no_other_page() {
    const MOST: u64 = (1 << 36) - 1;
    let mut tlbs = Tlbs::new(1);
    let rights = [Prot::R, Prot::RW, Prot::RWX, Prot::of(false, true, false)];
    for gfn in [0, 1, 63, 64, 0x1234_5678, MOST - 64, MOST] {
        for (pfn, prot) in [gfn, gfn ^ 1, gfn ^ ((1 << 30) - 1)]
            .into_iter()
            .flat_map(|pfn| rights.into_iter().map(move |prot| (pfn, prot)))
        {
            let to = Translation { pfn: Pfn::new(pfn), prot };
            tlbs.fill(0, Gfn::new(gfn), to);
            assert_eq!(tlbs.look_up(0, Gfn::new(gfn)), Some(to), "{gfn:#x}");
            assert_eq!(tlbs.remembered().collect::<Vec<_>>(), [(Gfn::new(gfn), to)]);
            for bit in 0..u64::BITS {
                assert_eq!(tlbs.look_up(0, Gfn::new(gfn ^ 1 << bit)), None, "{gfn:#x}, bit {bit}");
            }
        }
        tlbs.invalidate(Gfn::new(gfn), 1);
    }
    // What a line has no room for is not remembered, and takes nobody's place.
    tlbs.fill(0, Gfn::new(5), to(5));
    tlbs.fill(0, Gfn::new(69), to(1 << 30));
    tlbs.fill(0, Gfn::new((1 << 36) | 5), to((1 << 36) | 5));
    assert_eq!(gfns(&tlbs), [5]);
}

#[test]
fn who_remembers_nothing_costs_nothing() {
    let mut tlbs = Tlbs::new(64);
    assert_eq!(tlbs.look_up(40, Gfn::new(1)), None);
    assert!(tlbs.used.is_empty());
    tlbs.fill(40, Gfn::new(1), to(1));
    tlbs.fill(40, Gfn::new(2), to(2));
    tlbs.fill(7, Gfn::new(1), to(1));
    assert_eq!(tlbs.used.len(), 2);
    assert_eq!(tlbs.look_up(40, Gfn::new(2)), Some(to(2)));
    assert_eq!(tlbs.look_up(7, Gfn::new(2)), None);
}

const AT: Gfn = Gfn::new(5);

#[test]
fn a_hit_is_what_a_walk_would_find_and_a_miss_says_nothing() {
    let mut tlbs = Tlbs::default();
    let (vcpu, other) = (tlbs.add(), tlbs.add());
    let lines = tlbs.lines(vcpu).unwrap();
    let reader = lines.reader();
    let hit = |access| lines.hit(&reader, AT, access, |pfn| pfn.get());
    assert_eq!(hit(Access::Read), None);
    tlbs.fill(other, AT, to(9));
    assert_eq!(hit(Access::Read), None, "another vCPU's");
    tlbs.fill(vcpu, AT, Translation { pfn: Pfn::new(9), prot: Prot::R });
    assert_eq!((hit(Access::Read), hit(Access::Write)), (Some(9), None));
    tlbs.invalidate(AT, 1);
    assert_eq!(hit(Access::Read), None);
    assert!(tlbs.lines(2).is_none());

    tlbs.fill(vcpu, AT, to(9));
    let foreign = Tlbs::new(1).lines(0).unwrap().reader();
    assert_eq!(lines.hit(&foreign, AT, Access::Read, |_| ()), None);
    tlbs.close();
    tlbs.fill(vcpu, AT, to(9));
    assert_eq!((hit(Access::Read), gfns(&tlbs)), (None, vec![]));
    drop(tlbs);
    assert_eq!(hit(Access::Read), None);
}

/// Runs `end` while somebody is in the middle of a hit, and sees whether it waits.
fn waits(end: impl FnOnce(&mut Tlbs, usize)) -> bool {
    let mut tlbs = Tlbs::default();
    let vcpu = tlbs.add();
    tlbs.fill(vcpu, AT, to(9));
    let lines = tlbs.lines(vcpu).unwrap();
    let is_done = Mutex::new(false);
    std::thread::scope(|scope| {
        let (entered, ready) = mpsc::channel();
        let is_done = &is_done;
        scope.spawn(move || {
            let reader = lines.reader();
            let hit = lines.hit(&reader, AT, Access::Write, |_| {
                entered.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                *is_done.lock() = true;
            });
            assert_eq!(hit, Some(()));
        });
        ready.recv().unwrap();
        end(&mut tlbs, vcpu);
        *is_done.lock()
    })
}

#[test]
fn nobody_uses_what_was_forgotten() {
    assert!(waits(|tlbs, _| tlbs.invalidate(AT, 1)));
    assert!(waits(|tlbs, _| tlbs.invalidate(Gfn::new(0), u64::MAX)));
    assert!(waits(|tlbs, _| tlbs.close()));
    // The line has something else by now.
    assert!(waits(|tlbs, vcpu| {
        tlbs.fill(vcpu, Gfn::new(AT.get() + 64), to(10));
        tlbs.invalidate(AT, 1);
    }));
    // Where nobody can be in the way there is nothing to wait for.
    assert!(!waits(|tlbs, _| tlbs.invalidate(Gfn::new(6), 1)));
}

#[test]
fn without_the_barrier_nobody_looks_without_the_lock() {
    assert!(waits(|tlbs, vcpu| {
        let lines = tlbs.lines(vcpu).unwrap();
        let reader = lines.reader();
        tlbs.fill(vcpu, Gfn::new(6), to(6));
        let armed = arm(FailPoint::ForgettingBarrier, 0);
        tlbs.invalidate(AT, 1);
        assert!(armed.has_fired());
        tlbs.fill(vcpu, AT, to(9));
        for gfn in [AT, Gfn::new(6)] {
            assert_eq!(lines.hit(&reader, gfn, Access::Read, |_| ()), None);
            assert_eq!(tlbs.look_up(vcpu, gfn), None);
        }
    }));
}
