//! Allocating and freeing, without bytes: the pool's arithmetic behind its lock against a published
//! allocator of frames behind its own.

use std::sync::Mutex;

use buddy_system_allocator::LockedFrameAllocator;
use gmem::Commitment;
use gmem::addr::{ByteSize, Pfn, Pgoff};
use gmem::frames_only::FramesOnly;
use gmem::geometry::FolioSize;

use crate::Outcome;
use crate::harness::{Bench, Goal, Random};

/// 4 KiB to 1 GiB, as the pool has them.
pub(crate) type Peer = LockedFrameAllocator<19>;

const NR_FOLIOS: u64 = 8 << 10;
const IN_FOLIO: u64 = 512;

/// The folios that are in use, as places of an object: four of five.
fn used(random: &mut Random) -> Vec<bool> {
    (0..NR_FOLIOS).map(|_| random.below(5) != 0).collect()
}

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["alloc_free_2m", "alloc_free_2m_scattered", "alloc_free_2m_vec"]) {
        return Ok(());
    }
    let size = ByteSize::from_pages(NR_FOLIOS * IN_FOLIO);
    let pool = FramesOnly::new(size)?;
    let guest = pool.reserve(size, FolioSize::Huge2M, Commitment::Reserved)?;
    let peer = Peer::new();
    peer.lock().add_frame(0, (NR_FOLIOS * IN_FOLIO) as usize);
    let used = used(&mut Random::new());
    let take = |place: u64| {
        let page = Pgoff::new(place * IN_FOLIO);
        pool.take(guest, FolioSize::Huge2M, page).expect("it is promised")
    };
    let peer_take = || peer.lock().alloc(IN_FOLIO as usize).expect("the peer has room");
    let peer_free = |frame| peer.lock().dealloc(frame, IN_FOLIO as usize);

    // Both in the same state: four of five in use, the others anywhere between them.
    let all: Vec<usize> = used.iter().map(|_| peer_take()).collect();
    let (mut absent, mut live, mut peer_live) = (Vec::new(), Vec::<(u64, Pfn)>::new(), Vec::new());
    for ((place, used), frame) in used.iter().enumerate().zip(all) {
        if *used {
            live.push((place as u64, take(place as u64)));
            peer_live.push(frame);
        } else {
            absent.push(place as u64);
            peer_free(frame);
        }
    }

    let mut turn = absent.iter().cycle();
    bench.row(
        "alloc_free_2m",
        "buddy_system_allocator",
        Goal::AtMost(2.0),
        || pool.give_back(take(*turn.next().expect("some are absent"))),
        || peer_free(peer_take()),
    );
    // One in use anywhere comes back, and another is taken.
    let (mut ours, mut theirs) = (Random::new(), Random::new());
    bench.row(
        "alloc_free_2m_scattered",
        "buddy_system_allocator",
        Goal::None,
        || {
            let gone = ours.below(live.len() as u64) as usize;
            let place = ours.below(absent.len() as u64) as usize;
            let (freed, pfn) = live[gone];
            pool.give_back(pfn);
            let wanted = std::mem::replace(&mut absent[place], freed);
            live[gone] = (wanted, take(wanted));
        },
        || {
            let gone = theirs.below(peer_live.len() as u64) as usize;
            // As many random numbers as ours.
            let _ = theirs.below(7);
            peer_free(peer_live[gone]);
            peer_live[gone] = peer_take();
        },
    );
    // The least that can be done: nothing joins, nothing is found again.
    let free = Mutex::new((0..NR_FOLIOS / 5).collect::<Vec<u64>>());
    let lock = || free.lock().expect("nobody panics");
    let mut turn = (0..NR_FOLIOS).filter(|&place| !used[place as usize]).cycle();
    let taken: Vec<_> = live.iter().map(|(place, _)| *place).collect();
    // What the row before has taken is not free any more.
    let mut is_taken = vec![false; NR_FOLIOS as usize];
    taken.iter().for_each(|&place| is_taken[place as usize] = true);
    bench.row(
        "alloc_free_2m_vec",
        "mutexed_vec",
        Goal::None,
        || {
            let place = turn.find(|&place| !is_taken[place as usize]).expect("some are absent");
            pool.give_back(take(place));
        },
        || {
            let frame = lock().pop().expect("it has some");
            lock().push(frame);
        },
    );
    Ok(())
}
