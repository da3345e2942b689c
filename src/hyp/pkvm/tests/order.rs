//! Who asks for locks in another order than all others is noticed, whether anybody stands still or not.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::failpoint::{FailPoint, arm};
use crate::hyp::order;

#[track_caller]
fn noticed<T>(act: impl FnOnce() -> T) -> String {
    let panic = catch_unwind(AssertUnwindSafe(|| drop(act()))).unwrap_err();
    let as_text = panic.downcast_ref::<String>().cloned();
    as_text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap()
}

/// The mistake of a teardown that told objects with its machine locked.
#[test]
fn a_teardown_that_keeps_its_machine_is_noticed() {
    let world = World::new();
    let armed = arm(FailPoint::LetGoOfMachine, 0);
    let what = noticed(|| world.vm.teardown());
    assert!(armed.has_fired() && what.starts_with("who calls an object"), "{what}");
}

#[test]
fn locks_are_asked_for_in_their_order() {
    let world = World::new();
    let core = core_of(&world.vm);
    let Machine { cpus, el2, .. } = &*world.machine;
    let other = world.hyp.create_vm().unwrap();
    let mut last = cpus.first_for(0);
    let mut on_cpu = |act: &dyn Fn()| core.on_cpu(0, &mut last, |_, _| act());
    // The state first, then a CPU: as it is to be.
    {
        let _state = core.book.read();
        on_cpu(&|| ());
    }
    let acts: [&dyn Fn(); 2] = [&|| drop(core.book.read()), &|| drop(core.book.state.write())];
    for act in acts {
        assert_eq!(noticed(|| on_cpu(act)), "who has a CPU asks for State");
    }
    let again = noticed(|| on_cpu(&|| cpus.put(el2, |_| false)));
    assert_eq!(again, "who has a CPU asks for Cpu");
    assert!(noticed(|| on_cpu(&|| order::may_call_objects())).starts_with("who calls an object"));
    let other = core_of(&other);
    let two = noticed(|| (core.book.read(), other.book.state.write()));
    assert_eq!(two, "who has a VM's state asks for another");
    // What was had when somebody panicked is had no longer.
    order::may_call_objects();
    world.sound();
}
