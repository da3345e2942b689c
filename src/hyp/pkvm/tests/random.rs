//! A guest and its host do things at random; the tables keep agreeing with a plain model.

use super::*;

/// What the test believes of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Model {
    Host,
    Untouched,
    Guest(u8),
    Shared(u8),
}

#[test]
fn random_steps_keep_the_invariants() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 33) % below
    };
    let world = World::with(Visibility::Shared);
    let mut vcpu = world.vcpu();
    let mut model = [Model::Host; NR_PAGES as usize];
    for step in 0..4000_u64 {
        let page = random(NR_PAGES);
        let found = model[page as usize];
        let mut byte = [step as u8];
        let next = match random(6) {
            0 => match (vcpu.store(ipa(page), &byte), found) {
                (Err(Exit::MemoryFault { .. }), Model::Host) => Model::Host,
                (Ok(()), Model::Untouched | Model::Guest(_)) => Model::Guest(byte[0]),
                (Ok(()), Model::Shared(_)) => Model::Shared(byte[0]),
                other => panic!("store: {other:?}"),
            },
            1 => match (vcpu.load(ipa(page), &mut byte), found) {
                (Err(Exit::MemoryFault { .. }), Model::Host) => Model::Host,
                (Ok(()), Model::Untouched) => Model::Guest(byte[0]),
                (Ok(()), Model::Guest(had) | Model::Shared(had)) => {
                    assert_eq!(byte[0], had);
                    found
                }
                other => panic!("load: {other:?}"),
            },
            2 => match (vcpu.hvc(Hypercall::MemShare(ipa(page))), found) {
                (Err(Exit::MemoryFault { .. }), Model::Host) => Model::Host,
                (Ok(HvcResult::INVALID_PARAMETER), Model::Shared(_)) => found,
                (Err(Exit::Conversion(request)), Model::Untouched | Model::Guest(_)) => {
                    request.convert().unwrap();
                    assert_eq!(vcpu.answer().unwrap(), HvcResult::SUCCESS);
                    Model::Shared(world.host_reads(page).unwrap())
                }
                other => panic!("share: {other:?}"),
            },
            3 => match (vcpu.hvc(Hypercall::MemUnshare(ipa(page))), found) {
                (Ok(HvcResult::INVALID_PARAMETER), Model::Shared(_)) => panic!("it is shared"),
                (Ok(HvcResult::INVALID_PARAMETER), _) => found,
                (Err(Exit::Conversion(request)), Model::Shared(had)) => {
                    request.convert().unwrap();
                    assert_eq!(vcpu.answer().unwrap(), HvcResult::SUCCESS);
                    Model::Guest(had)
                }
                other => panic!("unshare: {other:?}"),
            },
            4 => match (world.convert(page, 1, Visibility::Private), found) {
                (Ok(()), Model::Host) => Model::Untouched,
                (Ok(()), Model::Untouched | Model::Guest(_)) => found,
                (Err(error), Model::Shared(_)) => {
                    assert_eq!(error.errno(), Errno::EPERM);
                    found
                }
                other => panic!("to private: {other:?}"),
            },
            _ => match (world.convert(page, 1, Visibility::Shared), found) {
                (Ok(()), Model::Host | Model::Shared(_)) => found,
                (Ok(()), Model::Untouched) => Model::Host,
                (Err(error), Model::Untouched | Model::Guest(_)) => {
                    assert_eq!(error.errno(), Errno::EPERM);
                    found
                }
                other => panic!("to shared: {other:?}"),
            },
        };
        model[page as usize] = next;
        if step % 16 == 0 {
            world.sound();
        }
    }
    drop(vcpu);
    world.vm.teardown().unwrap();
    assert_eq!(world.hyp.stat(), HostStat::default());
    world.sound();
    a_second_guest_finds_nothing_private_of_the_first(&world);
}

fn a_second_guest_finds_nothing_private_of_the_first(world: &World) {
    let vm = world.hyp.create_vm().unwrap();
    vm.bind(Gfn::new(BASE), &world.memfd, world.memfd.pages()).unwrap();
    let private = world.memfd.visibility(world.memfd.pages()).unwrap();
    let private: Vec<_> = private.filter(|(_, v)| *v == Visibility::Private).collect();
    assert!(!private.is_empty());
    let mut vcpu = vm.create_vcpu().unwrap();
    for page in private.iter().flat_map(|(pages, _)| pages.iter()) {
        let mut byte = [0xff];
        vcpu.load(ipa(page.get()), &mut byte).unwrap();
        assert_eq!(byte, [0]);
    }
    world.sound();
}
