//! Who touches what is not mapped for it gets an abort, and nothing else happens.

use super::super::rm::Vmid;
use super::super::rm::message::Transfer;
use super::super::touch::{Abort, Bytes, KernelOutcome, Signal};
use super::full::*;
use super::*;
use crate::addr::Ipa;
use crate::error::Errno;

#[test]
fn the_hosts_ways_to_memory_that_it_lent() {
    let full = Full::new();
    assert!(full.store(HOST, RAM, b"host"));
    let handle = full.create(HOST, &lend(&[(A, 7)], &[(RAM, 1)])).unwrap();
    full.accept(A, &take(handle, Transfer::Lend)).unwrap();
    assert!(full.store(A, 0, b"mine"));
    let at = Ipa::new(RAM * PAGE);
    let before = full.picture();
    let mut buf = [7; 4];
    assert_eq!(full.gunyah.user(at, Bytes::Load(&mut buf)), Err(Signal::Sigbus));
    assert_eq!(full.gunyah.user(at, Bytes::Store(b"evil")), Err(Signal::Sigbus));
    assert_eq!(full.gunyah.uaccess(at, Bytes::Load(&mut buf)), Err(Errno::EFAULT));
    assert_eq!(full.gunyah.kernel_alias(at, Bytes::Store(b"evil")), KernelOutcome::Fatal);
    assert_eq!(buf, [7; 4]);
    // No page is taken back by force, and none is destroyed.
    let after = full.picture();
    assert_eq!((before.difference(&after), &before.heads), (None, &after.heads));
    assert_eq!(full.load(A, 0), Some(*b"mine"));
    full.release(A, handle, 0).unwrap();
    assert_eq!(full.load(A, 0), None, "given back is gone");
    full.reclaim(HOST, handle, 0).unwrap();
    full.gunyah.user(at, Bytes::Load(&mut buf)).unwrap();
    assert_eq!(&buf, b"mine");
    assert_eq!(full.gunyah.uaccess(at, Bytes::Store(b"host")), Ok(()));
    assert_eq!(full.gunyah.kernel_alias(at, Bytes::Load(&mut buf)), KernelOutcome::Done);
    assert_eq!(&buf, b"host");
}

#[test]
fn rights_count_and_so_does_the_page() {
    let full = Full::new();
    let handle = full.create(HOST, &share(&[(HOST, 4), (A, 4), (B, 6)], &[(RAM, 1)])).unwrap();
    for vmid in [A, B] {
        full.accept(vmid, &take(handle, Transfer::Share)).unwrap();
    }
    assert!(full.store(B, 0, b"seen"));
    assert_eq!([(A, 0), (HOST, RAM)].map(|(vmid, gfn)| full.load(vmid, gfn)), [Some(*b"seen"); 2]);
    assert!(!full.store(A, 0, b"evil") && !full.store(HOST, RAM, b"evil"));
    let touch = |vmid, at| full.gunyah.vcpu(vmid, Ipa::new(at), Bytes::Store(b"four"));
    assert_eq!(touch(B, 4093), Err(Abort::Impossible));
    assert_eq!(touch(B, u64::MAX), Err(Abort::Impossible));
    assert_eq!(touch(B, 1 << 60), Err(Abort::External));
    assert_eq!(touch(B, PAGE), Err(Abort::External));
    assert_eq!(touch(Vmid(0x99), 0), Err(Abort::NotRunning));
    full.gunyah.with(|world| world.rm.pause_vm(HOST, B, true)).unwrap();
    assert_eq!(touch(B, 0), Err(Abort::NotRunning));
}

#[test]
fn threads_see_old_or_new_and_never_between() {
    let full = Full::new();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut nr = [0; 2];
            for _ in 0..2000 {
                let value = full.load(HOST, RAM);
                assert!(
                    value.is_none() || value == Some([0; 4]) || value == Some(*b"mine"),
                    "{value:?}"
                );
                nr[usize::from(value.is_some())] += 1;
            }
            nr
        });
        for _ in 0..60 {
            let handle = full.create(HOST, &lend(&[(A, 7)], &[(RAM, 1)])).unwrap();
            full.accept(A, &take(handle, Transfer::Lend)).unwrap();
            assert!(full.store(A, 0, b"only"));
            assert!(full.store(A, 0, b"mine"));
            full.release(A, handle, 0).unwrap();
            full.reclaim(HOST, handle, 0).unwrap();
        }
        assert_eq!(reader.join().unwrap().iter().sum::<u32>(), 2000);
    });
    full.sound();
}
