//! One table of operations, and two that carry it out: gmem, and the kernel's guest_memfd where `/dev/kvm` has one
//! that can be mapped. What differs is in the table with its reason, and in design/host.md.

// UNSAFETY: system calls on raw pointers, faults of raw pointers, and ioctls of KVM.
#![expect(unsafe_code, reason = "what the kernel makes of raw pointers is what is compared")]

#[path = "vectors/calls.rs"]
mod calls;
mod common;
#[path = "vectors/kernels.rs"]
mod kernels;
#[path = "common/kvm.rs"]
mod kvm;
#[path = "vectors/ours.rs"]
mod ours;
#[path = "vectors/subject.rs"]
mod subject;
#[path = "vectors/table.rs"]
mod table;
#[path = "common/uring.rs"]
mod uring;

use common::Capability;
use subject::{Op, Ours, Side, Subject};

/// Runs every vector on a fresh object, and says all that does not fit.
fn run<S: Subject>(
    make: impl Fn(Side) -> S,
    expected: impl Fn(&table::Step) -> Option<subject::Answer>,
) {
    let mut wrong = Vec::new();
    let mut nr_steps = 0;
    let has_uring = common::require(Capability::Uring);
    for vector in table::vectors() {
        let mut subject = make(vector.side);
        for step in &vector.steps {
            let Some(expected) = expected(step) else { continue };
            if step.op.needs_uring() && !has_uring {
                continue;
            }
            let answer = subject.apply(&step.op);
            nr_steps += 1;
            if answer != expected {
                wrong.push(format!("{}: {:?}: {answer:?}, not {expected:?}", vector.name, step.op));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {nr_steps}\n{}", wrong.len(), wrong.join("\n"));
    assert!(nr_steps > 100, "only {nr_steps} steps");
}

#[test]
fn gmem_answers_as_the_table_says() {
    if !common::require(Capability::Uffd) {
        return;
    }
    run(ours::Gmem::new, |step| match &step.ours {
        Ours::Same => Some(step.kernel),
        Ours::Differs(answer, _) => Some(*answer),
        Ours::CannotBeSaid(_) => None,
    });
}

#[test]
fn the_kernel_answers_as_the_table_says() {
    if !common::require(Capability::Kvm) || !common::settle(Capability::Kvm, kvm::probe()) {
        return;
    }
    run(kernels::Kernel::new, |step| Some(step.kernel));
}

/// The list in design/host.md is complete: it has every reason that the table gives.
#[test]
fn every_difference_is_listed_with_its_reason() {
    let page = include_str!("../design/host.md").split_whitespace().collect::<Vec<_>>().join(" ");
    let mut missing = Vec::new();
    for step in table::vectors().iter().flat_map(|vector| &vector.steps) {
        if let Ours::Differs(_, why) | Ours::CannotBeSaid(why) = &step.ours {
            if !page.contains(why.heading()) {
                missing.push(format!("{why:?}"));
            }
        }
    }
    missing.sort();
    missing.dedup();
    assert!(missing.is_empty(), "design/host.md lacks {missing:?}");
}

#[test]
fn the_table_is_not_empty_talk() {
    let vectors = table::vectors();
    let steps: Vec<_> = vectors.iter().flat_map(|vector| &vector.steps).collect();
    let nr_same = steps.iter().filter(|step| matches!(step.ours, Ours::Same)).count();
    println!("{} vectors, {} steps, {nr_same} the same", vectors.len(), steps.len());
    assert!(nr_same * 2 > steps.len(), "more than half of it is the same: {nr_same}");
    let touches = steps.iter().filter(|step| matches!(step.op, Op::Touch(..))).count();
    assert!(touches > 20, "{touches}");
}
