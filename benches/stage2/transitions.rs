//! Pages that change hands. Each turn goes through all pages of a guest of one GiB, and has a guest of its own.

use std::hint::black_box;
use std::time::Instant;

use gmem::addr::Gfn;
use gmem::el2_only::Kind;

use crate::Outcome;
use crate::bare::BareTree;
use crate::harness::{Bench, Goal};
use crate::machine::{Machine, Order};

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

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    let names = ["donate_4k", "share_unshare_4k", "share_2m", "teardown"];
    let names = names.map(|name| [name.to_string(), format!("{name}_in_order")]).concat();
    if !bench.wants_any(&names.iter().map(String::as_str).collect::<Vec<_>>()) {
        return Ok(());
    }
    let mut machine = Machine::new(1)?;
    let (mut host, mut guest) = machine.bare();
    for (order, suffix) in [(Order::Random, ""), (Order::Ascending, "_in_order")] {
        let goal = |limit| if suffix.is_empty() { Goal::AtMost(limit) } else { Goal::None };
        // The peers need the order of the pages, and ours the machine.
        let pages: Vec<_> = machine.pages(order).map(|gfn| (gfn, machine.frame_of(gfn))).collect();
        let pages: Vec<_> = pages.into_iter().map(|(gfn, pfn)| (gfn, pfn.get())).collect();
        bench.timed_row(
            &format!("donate_4k{suffix}"),
            "two_bare_walks_two_stores",
            goal(6.0),
            |_| donate(&mut machine, order),
            |_| bare_stores(&mut host, &mut guest, &pages, 1),
        );
        bench.timed_row(
            &format!("share_unshare_4k{suffix}"),
            "four_bare_walks_four_stores",
            goal(6.0),
            |_| share_unshare(&mut machine, order),
            |_| bare_stores(&mut host, &mut guest, &pages, 2),
        );
        let machine = std::cell::RefCell::new(&mut machine);
        let donated = std::cell::Cell::new(0.0);
        bench.timed_row(
            &format!("teardown{suffix}"),
            "donate_4k",
            goal(1.5),
            |_| {
                let (donate, reclaim) = donate_and_reclaim(&mut machine.borrow_mut(), order);
                donated.set(donate);
                reclaim
            },
            |_| donated.get(),
        );
        if order == Order::Random {
            bench.timed_row(
                "share_2m",
                "512_single_shares",
                Goal::AtMost(0.1),
                |_| share_2m(&mut machine.borrow_mut()),
                |_| single_shares(&mut machine.borrow_mut()),
            );
        }
    }
    assert_eq!(machine.el2.check(), Vec::<String>::new());
    Ok(())
}

/// Nanoseconds for each of so many.
fn each(nr: u64, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / nr as f64
}

fn donate(machine: &mut Machine, order: Order) -> f64 {
    machine.new_guest(Kind::Protected, machine.nr_pages);
    let taken = each(machine.nr_pages, || machine.donate_all(order));
    machine.end_protected_guest();
    taken
}

/// The same, and how long it took to get a page back.
fn donate_and_reclaim(machine: &mut Machine, order: Order) -> (f64, f64) {
    machine.new_guest(Kind::Protected, machine.nr_pages);
    let given = each(machine.nr_pages, || machine.donate_all(order));
    machine.el2.stop_guest().expect("a guest");
    let taken = each(machine.nr_pages, || machine.reclaim_all(order));
    machine.end_guest();
    (given, taken)
}

fn share_unshare(machine: &mut Machine, order: Order) -> f64 {
    machine.protected_guest();
    let taken = each(machine.nr_pages, || {
        for gfn in machine.pages(order).map(Gfn::new) {
            machine.el2.share(gfn).expect("the guest's own");
            machine.el2.unshare(gfn).expect("what was shared");
        }
    });
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
    let taken = each(nr_blocks, || {
        for gfn in all() {
            let lent = machine.el2.lend(machine.frame_of(gfn), Gfn::new(gfn), nr_pages);
            lent.expect("the host's page, and nothing there");
        }
    });
    for gfn in all() {
        machine.el2.hide(Gfn::new(gfn), nr_pages).expect("what was lent");
    }
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
