//! Transient accesses against a conversion: an access takes nothing, so the conversion waits for it.
//!
//! Readers are registered before the threads part, except where registering is the question, and
//! are given back for the main thread to drop: the lock around their list would order more than a
//! section does.

use gmem::modelled::{Reader, Visibility};
use loom::thread;
use loom_tests::{World, explore, must_be_caught, pages};
use std::sync::Arc;

use crate::RACE;

/// What the host writes in a transient access.
const WRITTEN: u64 = 11;

/// Proves: an access sees the bytes of before, or is refused; it never sees a byte written after the
/// memory turned private. And it never makes a conversion fail.
#[test]
fn read() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || (world.read_in_section(&reader, pages(0..2)), reader))
        };
        world.convert(pages(0..2), Visibility::Private).expect("an access is not a pin");
        let (seen, _reader) = host.join().unwrap();

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        world.expect_idle(pages(0..2), Visibility::Private);
        assert_eq!(world.memory.read_all(pages(0..2)), World::SECRET);
    });
}

/// Proves: a conversion keeps what an access wrote before, or the access is refused and wrote nothing.
#[test]
fn write() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                (world.write_in_section(&reader, pages(0..2), WRITTEN).is_some(), reader)
            })
        };
        let frozen = world.table.freeze_for(pages(0..2), Visibility::Private).unwrap();
        world.wait();
        let kept = world.memory.read_all(pages(0..2));
        frozen.release(Visibility::Private);
        let (written, _reader) = host.join().unwrap();

        assert_eq!(kept, if written { WRITTEN } else { World::HOST });
    });
}

/// Proves: the grace period covers each of several sections in a row. The conversion waits for one of
/// them and may learn that it has ended from the next one's mark.
#[test]
fn sections_in_a_row() {
    explore(|| {
        let world = World::new(1, Visibility::Shared);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let seen = [(); 2].map(|()| world.read_in_section(&reader, pages(0..1)));
                (seen, reader)
            })
        };
        world.convert(pages(0..1), Visibility::Private).unwrap();
        let (seen, _reader) = host.join().unwrap();

        let host = Some(World::HOST);
        assert!([[host, host], [host, None], [None, None]].contains(&seen), "{seen:?}");
    });
}

/// Proves: a section inside another neither ends the outer one nor hides it.
#[test]
fn sections_nest() {
    explore(|| {
        let world = World::new(1, Visibility::Shared);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let outer = reader.enter();
                let open = world.table.check_open(pages(0..1)).is_ok();
                world.read_in_section(&reader, pages(0..1));
                let seen = open.then(|| world.memory.read_all(pages(0..1)));
                drop(outer);
                (seen, reader)
            })
        };
        world.convert(pages(0..1), Visibility::Private).unwrap();
        let (seen, _reader) = host.join().unwrap();

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
    });
}

/// Proves: a conversion waits for all readers, not just for the first it finds.
#[test]
fn two_readers() {
    explore(|| {
        let world = World::new(1, Visibility::Shared);
        let hosts = [(); 2].map(|()| {
            let (reader, world) = (world.reader(), Arc::clone(&world));
            thread::spawn(move || (world.read_in_section(&reader, pages(0..1)), reader))
        });
        world.convert(pages(0..1), Visibility::Private).unwrap();
        for host in hosts {
            let (seen, _reader) = host.join().unwrap();
            assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        }
    });
}

/// Proves: an access during a round trip sees the bytes of before or those of after, and never what
/// was there in between.
#[test]
fn round_trip() {
    explore(|| {
        let world = World::new(1, Visibility::Shared);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || (world.read_in_section(&reader, pages(0..1)), reader))
        };
        world.convert(pages(0..1), Visibility::Private).unwrap();
        world.convert(pages(0..1), Visibility::Shared).unwrap();
        let (seen, _reader) = host.join().unwrap();

        assert!(matches!(seen, None | Some(World::HOST | World::PREPARED)), "{seen:?}");
    });
}

/// Proves: two conversions may wait at the same time, each for a reader of either's pages.
#[test]
fn two_conversions_wait() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || (world.read_in_section(&reader, pages(0..2)), reader))
        };
        let upper = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.convert(pages(1..2), Visibility::Private))
        };
        assert_eq!(world.convert(pages(0..1), Visibility::Private), Ok(()));
        assert_eq!(upper.join().unwrap(), Ok(()));
        let (seen, _reader) = host.join().unwrap();

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        world.expect_idle(pages(0..2), Visibility::Private);
    });
}

/// Proves: a reader that registers while a conversion waits is either waited for or sees the frozen
/// words; and one that goes away meanwhile is not waited for any more.
#[test]
fn registration() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let reader = world.reader();
                world.read_in_section(&reader, pages(0..2))
            })
        };
        world.convert(pages(0..2), Visibility::Private).unwrap();
        let seen = host.join().unwrap();

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        world.expect_idle(pages(0..2), Visibility::Private);
    });
}

/// Proves: as above with one reader there from the start and one that comes and goes.
#[test]
fn registration_beside_a_reader() {
    explore(|| {
        let world = World::new(1, Visibility::Shared);
        let settled = {
            let (reader, world) = (world.reader(), Arc::clone(&world));
            thread::spawn(move || (world.read_in_section(&reader, pages(0..1)), reader))
        };
        let newcomer = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.read_in_section(&world.reader(), pages(0..1)))
        };
        world.convert(pages(0..1), Visibility::Private).unwrap();
        let (first, _reader) = settled.join().unwrap();
        for seen in [first, newcomer.join().unwrap()] {
            assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        }
    });
}

type Read = fn(&World, &Reader);
type Convert = fn(&World);

/// A read and a conversion of one page in these ways.
fn one_page(read: Read, convert: Convert) {
    let world = World::new(1, Visibility::Shared);
    let reader = world.reader();
    let host = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            read(&world, &reader);
            reader
        })
    };
    convert(&world);
    drop(host.join().unwrap());
}

fn properly(world: &World, reader: &Reader) {
    world.read_in_section(reader, pages(0..1));
}

fn convert(world: &World) {
    world.convert(pages(0..1), Visibility::Private).unwrap();
}

/// Shows that the canaries below die of their seeds: the same model without one passes.
#[test]
fn one_page_without_a_seed() {
    explore(|| one_page(properly, convert));
}

/// Seed: the conversion has no grace period at all.
#[test]
fn canary_no_grace_period() {
    must_be_caught(RACE, || {
        one_page(properly, |world| {
            world.convert_without_readers(pages(0..1), Visibility::Private).unwrap();
        });
    });
}

/// Seed: the conversion has the fence of a grace period, and does not look who is inside.
#[test]
fn canary_fence_without_wait() {
    must_be_caught(RACE, || {
        one_page(properly, |world| {
            let frozen = world.table.freeze(pages(0..1)).unwrap();
            fence_as_wait_does();
            world.memory.write_all(pages(0..1), World::SECRET);
            frozen.release(Visibility::Private);
        });
    });
}

/// Seed: the conversion waits first and freezes after that; nothing else is missing.
#[test]
fn canary_wait_before_freeze() {
    must_be_caught(RACE, || {
        one_page(properly, |world| {
            world.wait();
            let frozen = world.table.freeze(pages(0..1)).unwrap();
            fence_as_wait_does();
            world.memory.write_all(pages(0..1), World::SECRET);
            frozen.release(Visibility::Private);
        });
    });
}

fn fence_as_wait_does() {
    // SeqCst: pairs with the fence in `Reader::enter`.
    loom::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// Seed: the access looks at the words and enters its section after that.
#[test]
fn canary_check_before_enter() {
    let faulty: Read = |world, reader| {
        if world.table.check_open(pages(0..1)).is_ok() {
            let _section = reader.enter();
            world.memory.read_all(pages(0..1));
        }
    };
    must_be_caught(RACE, move || one_page(faulty, convert));
}

/// Seed: the access leaves its section before it copies.
#[test]
fn canary_copy_after_leave() {
    let faulty: Read = |world, reader| {
        let section = reader.enter();
        let open = world.table.check_open(pages(0..1)).is_ok();
        drop(section);
        if open {
            world.memory.read_all(pages(0..1));
        }
    };
    must_be_caught(RACE, move || one_page(faulty, convert));
}
