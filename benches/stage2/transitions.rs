//! Pages that change hands. Each turn goes through all pages of a guest of one GiB, and has a guest of its own.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::time::Instant;

use gmem::addr::Gfn;
use gmem::el2_only::Kind;

use crate::Outcome;
use crate::bare::BareTree;
use crate::harness::{Bench, Goal};
use crate::machine::{Caller, Machine, Order};

const HUGE: u64 = 512;

/// What a row measures: one turn on a machine, and how many nanoseconds one of its operations took.
pub(crate) type Turn = fn(&mut Machine) -> f64;

/// Rows that are measured again on a large machine.
pub(crate) const TURNS: [(&str, Turn); 4] = [
    ("donate_4k", |machine| donate(machine, Order::Random)),
    ("share_unshare_4k", |machine| share_unshare(machine, Order::Random)),
    ("share_2m", share_2m),
    ("teardown", |machine| donate_and_reclaim(machine, Order::Random).1),
];

/// How pages are gone through and who calls; the first is what the figures are about.
const WAYS: [(&str, Order, Caller); 3] = [
    ("", Order::Random, Caller::IsCpu),
    ("_in_order", Order::Ascending, Caller::IsCpu),
    ("_by_number", Order::Random, Caller::NamesCpu),
];

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    let rows = ["donate_4k", "share_unshare_4k", "share_unshare_4k_at_once", "teardown"];
    let names = WAYS.map(|(suffix, ..)| rows.map(|name| format!("{name}{suffix}"))).concat();
    let names: Vec<_> = names.iter().map(String::as_str).chain(["share_2m"]).collect();
    if !bench.wants_any(&names) {
        return Ok(());
    }
    let mut machine = Machine::new(1)?;
    for (suffix, order, caller) in WAYS {
        machine.caller = caller;
        protected(bench, &mut machine, order, suffix);
    }
    machine.caller = Caller::IsCpu;
    let machine = RefCell::new(machine);
    bench.timed_row(
        "share_2m",
        "512_single_shares",
        Goal::AtMost(0.1),
        |_| share_2m(&mut machine.borrow_mut()),
        |_| single_shares(&mut machine.borrow_mut()),
    );
    assert_eq!(machine.borrow().el2.check(), Vec::<String>::new());
    Ok(())
}

fn protected(bench: Bench, machine: &mut Machine, order: Order, suffix: &str) {
    let goal = |limit| if suffix.is_empty() { Goal::AtMost(limit) } else { Goal::None };
    let (mut host, mut guest) = machine.bare();
    let pages = machine.pages(order).map(|gfn| (gfn, machine.frame_of(gfn).get()));
    let pages: Vec<_> = pages.collect();
    bench.timed_row(
        &format!("donate_4k{suffix}"),
        "two_bare_walks_two_stores",
        goal(6.0),
        |_| donate(machine, order),
        |_| bare_stores(&mut host, &mut guest, &pages, 1),
    );
    bench.timed_row(
        &format!("share_unshare_4k{suffix}"),
        "two_bare_walks_two_stores_twice",
        goal(6.0),
        |_| share_unshare(machine, order),
        |_| [1, 1].map(|times| bare_stores(&mut host, &mut guest, &pages, times)).iter().sum(),
    );
    bench.timed_row(
        &format!("share_unshare_4k_at_once{suffix}"),
        "four_bare_walks_four_stores",
        Goal::None,
        |_| share_unshare_at_once(machine, order),
        |_| bare_stores(&mut host, &mut guest, &pages, 2),
    );
    let donated = Cell::new(0.0);
    let reclaim = |_| {
        let (given, taken) = donate_and_reclaim(machine, order);
        donated.set(given);
        taken
    };
    bench.timed_row(&format!("teardown{suffix}"), "donate_4k", goal(1.5), reclaim, |_| {
        donated.get()
    });
}

/// Nanoseconds for each of so many.
fn each(nr: u64, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / nr as f64
}

fn donate(machine: &mut Machine, order: Order) -> f64 {
    machine.new_guest(Kind::Protected, machine.nr_pages);
    let taken = {
        let mut cpu = machine.cpu();
        each(machine.nr_pages, || machine.donate_all(&mut cpu, order))
    };
    machine.end_protected_guest();
    taken
}

/// The same, and how long it took to get a page back.
fn donate_and_reclaim(machine: &mut Machine, order: Order) -> (f64, f64) {
    machine.new_guest(Kind::Protected, machine.nr_pages);
    let given = {
        let mut cpu = machine.cpu();
        each(machine.nr_pages, || machine.donate_all(&mut cpu, order))
    };
    machine.el2.stop_guest().expect("a guest");
    let taken = {
        let mut cpu = machine.cpu();
        each(machine.nr_pages, || machine.reclaim_all(&mut cpu, order))
    };
    machine.end_guest();
    (given, taken)
}

/// Shares all pages and, from the middle on, hides them again: each when many others have been shared since.
fn share_unshare(machine: &mut Machine, order: Order) -> f64 {
    machine.protected_guest();
    let half = machine.nr_pages as usize / 2;
    let mut cpu = machine.cpu();
    let taken = each(machine.nr_pages, || {
        for gfn in machine.pages(order) {
            cpu.share(Gfn::new(gfn)).expect("the guest's own");
        }
        for gfn in machine.pages(order).skip(half).chain(machine.pages(order).take(half)) {
            cpu.unshare(Gfn::new(gfn)).expect("what was shared");
        }
    });
    drop(cpu);
    machine.end_protected_guest();
    taken
}

/// Shares each page and hides it at once.
fn share_unshare_at_once(machine: &mut Machine, order: Order) -> f64 {
    machine.protected_guest();
    let mut cpu = machine.cpu();
    let taken = each(machine.nr_pages, || {
        for gfn in machine.pages(order).map(Gfn::new) {
            cpu.share(gfn).expect("the guest's own");
            cpu.unshare(gfn).expect("what was shared");
        }
    });
    drop(cpu);
    machine.end_protected_guest();
    taken
}

/// Writes what a donation writes into both trees, or a share and its end.
fn bare_stores(host: &mut BareTree, guest: &mut BareTree, pages: &[(u64, u64)], times: u64) -> f64 {
    each(pages.len() as u64, || {
        for &(gfn, pfn) in pages {
            for nth in 0..times {
                *host.entry(black_box(pfn)) = gfn << 20 | nth;
                *guest.entry(black_box(gfn)) = pfn << 12 | nth;
            }
        }
    })
}

fn lend_and_end(machine: &mut Machine, nr_pages: u64) -> f64 {
    let nr_blocks = machine.nr_pages / HUGE;
    machine.new_guest(Kind::NonProtected, machine.nr_pages / nr_pages);
    // Blocks as a guest's faults come; their pages one after another.
    let blocks: Vec<_> = machine.pages(Order::Random).filter(|gfn| gfn % HUGE == 0).collect();
    let all = || blocks.iter().flat_map(|block| (*block..block + HUGE).step_by(nr_pages as usize));
    let mut cpu = machine.cpu();
    let taken = each(nr_blocks, || {
        for gfn in all() {
            let lent = cpu.lend(machine.frame_of(gfn), Gfn::new(gfn), nr_pages);
            lent.expect("the host's page, and nothing there");
        }
    });
    for gfn in all() {
        cpu.hide(Gfn::new(gfn), nr_pages).expect("what was lent");
    }
    drop(cpu);
    machine.el2.stop_guest().expect("a guest");
    machine.end_guest();
    taken
}

fn share_2m(machine: &mut Machine) -> f64 {
    lend_and_end(machine, HUGE)
}

fn single_shares(machine: &mut Machine) -> f64 {
    lend_and_end(machine, 1)
}
