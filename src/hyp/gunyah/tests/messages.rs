//! Bytes that are no message, and bytes that are.

use super::super::error::RmError::*;
use super::super::hostile::wire::encode;
use super::super::rm::Vmid;
use super::super::rm::message::*;
use super::full::*;
use super::*;
use proptest::prelude::*;

fn examples() -> Vec<Request> {
    let attrs = vec![AttrEntry { attr: 3, vmid: B }];
    let create =
        Create { attrs: attrs.clone(), ..lend(&[(A, 7), (B, 4)], &[(1, 2), (7, 1), (8, 0)]) };
    let accept = Accept {
        acl: acl(&[(A, 7)]),
        sgl: sgl(&[(0, 5)]),
        map_vmid: Vmid(0x1234),
        attrs,
        ..take(77, Transfer::Share)
    };
    vec![
        Request::Create(create.clone()),
        Request::Create(Create { transfer: Transfer::Share, ..create.clone() }),
        Request::Create(Create { transfer: Transfer::Donate, ..create }),
        Request::Accept(accept),
        Request::Append { handle: 5, flags: 1, sgl: sgl(&[(1, 1)]) },
        Request::Release { handle: 6, flags: 1 },
        Request::Reclaim { handle: 7, flags: 0 },
        Request::Notify { handle: 8, flags: 2, tag: 9, list: vec![1, 0, 0, 0, 3, 0, 0, 0] },
    ]
}

#[test]
fn what_is_written_is_read() {
    for request in examples() {
        let (id, body) = encode(&request);
        assert_eq!(parse(id, &body).as_ref(), Ok(&request));
    }
    assert_eq!(
        [DONATE, ACCEPT, LEND, SHARE, RELEASE, RECLAIM, NOTIFY, APPEND].map(|id| id & 0xff),
        [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x17, 0x18]
    );
}

#[test]
fn what_is_cut_off_is_none() {
    for request in examples() {
        let (id, body) = encode(&request);
        for len in 0..body.len() {
            match (parse(id, &body[..len]), &request) {
                (Err(error), _) => assert_eq!(error, MsgInvalid, "{request:?} {len}"),
                // Lists at the end may be missing as a whole; a list of VMs is read later.
                (Ok(Request::Create(_) | Request::Accept(_)), _) => assert!(len >= 20),
                (Ok(Request::Append { sgl, .. }), _) => assert_eq!(sgl, []),
                (Ok(Request::Notify { .. }), _) => assert!(len >= 12),
                (other, _) => panic!("{other:?}"),
            }
        }
        let more = [&body[..], &[0]].concat();
        let ignores = matches!(
            request,
            Request::Release { .. } | Request::Reclaim { .. } | Request::Notify { .. }
        );
        assert_eq!(parse(id, &more).is_ok(), ignores, "{request:?}");
    }
    let long = vec![0; 232 * 63 + 1];
    assert_eq!(parse(RELEASE, &long), Err(MsgInvalid));
    assert!(parse(RELEASE, &long[1..]).is_ok());
    // Where the list of addresses is missing, so is the VM to map for: the original reads on.
    let (id, body) =
        encode(&Request::Accept(Accept { acl: acl(&[(A, 7); 4]), ..take(1, Transfer::Lend) }));
    assert_eq!(parse(id, &body[..12 + 4 + 16]), Err(MsgInvalid));
}

#[test]
fn lists_have_an_end() {
    for (nr, fits) in [(512, true), (513, false)] {
        let pages = vec![(RAM, 1); nr];
        let (id, body) = encode(&Request::Append { handle: 0, flags: 0, sgl: sgl(&pages) });
        assert_eq!(parse(id, &body).is_ok(), fits);
        if !fits {
            assert_eq!(parse(id, &body), Err(NoResource));
            // Before it is seen that there are not so many.
            assert_eq!(parse(id, &body[..40]), Err(NoResource));
        }
    }
    assert_eq!(vmid_list(&[2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 9], 2), Ok(vec![Vmid(1), Vmid(2)]));
    let full = Full::new();
    let unknown = full.gunyah.message(HOST, 0x5100_0016, &[0; 64]);
    assert_eq!(unknown.bytes(), u32::MAX.to_le_bytes());
    // Who is not there, does not run, or is the resource manager cannot send.
    let (id, body) = encode(&examples()[5]);
    assert_eq!(full.gunyah.message(Vmid(0x90), id, &body).error, Some(VmidInvalid));
    full.gunyah.with(|world| world.rm.stop_vm(HOST, A)).unwrap();
    assert_eq!(full.gunyah.message(A, id, &body).error, Some(VmState));
    assert_eq!(full.gunyah.message(Vmid::RM, id, &body).error, Some(VmState));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(id in 0x5100_000f_u32..0x5100_001a, body in prop::collection::vec(any::<u8>(), 0..80)) {
        parse(id, &body).ok();
        vmid_list(&body, 4).ok();
    }

    #[test]
    fn a_byte_more_or_less_is_no_harm(which in 0_usize..8, at in 0_usize..120, value: u8) {
        let (id, mut body) = encode(&examples()[which]);
        let at = at % body.len();
        body[at] = value;
        parse(id, &body).ok();
    }
}

#[test]
fn bytes_for_a_seed_are_always_the_same() {
    assert_eq!(bytes(1, 100), bytes(1, 100));
    assert_ne!(bytes(1, 100), bytes(2, 100));
}
