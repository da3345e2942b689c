//! Devices that find pages where a guest sees them: when the guest goes, so do the places, whatever the keeper of
//! the domain makes of it, and no device reaches what comes to be the next guest's.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gmem::addr::{ByteSize, Gfn, Ipa, Offset, Pgoff};
use gmem::error::{Errno, ErrorKind};
use gmem::hyp::iommu::{Device, Domain, DomainState, Places};
use gmem::hyp::{Hypervisor, Vm};
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, OnSilence, Standing,
    SubscribeOptions, Subscriber, Subscription, Visibility,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;
const SHORT: Duration = Duration::from_millis(20);
const SECRET: &[u8; 6] = b"SECRET";

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn at(page: u64) -> Ipa {
    Gfn::new(page).ipa()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the keeper of a domain takes it to be asked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    LetGo,
    Refuse,
    Lose,
    Keep,
    Panic,
}

const BAD: [Mood; 4] = [Mood::Refuse, Mood::Lose, Mood::Keep, Mood::Panic];

/// The library's domain, and somebody between it and the object.
#[derive(Debug)]
struct Keeper {
    domain: Domain,
    mood: Mutex<Mood>,
    fence: Mutex<Result<(), Errno>>,
    acks: Mutex<Vec<Ack>>,
}

impl Keeper {
    fn new(pool: &FolioPool) -> Arc<Self> {
        Arc::new(Self {
            domain: Domain::new(pool, Places::Guest).unwrap(),
            mood: Mutex::new(Mood::LetGo),
            fence: Mutex::new(Err(Errno::EOPNOTSUPP)),
            acks: Mutex::default(),
        })
    }

    fn is(&self, mood: Mood) {
        *lock(&self.mood) = mood;
        lock(&self.acks).clear();
    }
}

impl Subscriber for Keeper {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        let mood = *lock(&self.mood);
        match mood {
            Mood::LetGo => self.domain.revoke(runs, ack),
            Mood::Refuse => drop(ack.refuse(Errno::EBUSY)),
            Mood::Lose => drop(ack),
            Mood::Keep => lock(&self.acks).push(ack),
            Mood::Panic => panic!("the keeper is broken"),
        }
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.domain.grant(runs);
    }

    fn fence(&self) -> Result<(), Errno> {
        (*lock(&self.fence))?;
        self.domain.fence()
    }
}

/// A guest at 0x100, with a device that finds its pages there.
struct World {
    pool: FolioPool,
    memfd: GuestMemfd,
    hypervisor: Hypervisor,
    vm: Vm,
    keeper: Arc<Keeper>,
    it: Subscription,
    device: Device,
}

impl World {
    fn new(on_silence: OnSilence) -> Self {
        let size = ByteSize::from_mib(2);
        let pool = FolioPool::new(ArenaBacking::Heap, size).unwrap();
        let memfd = GuestMemfd::builder(size).initial(SHARED).create(&pool).unwrap();
        memfd.allocate(memfd.pages()).unwrap();
        memfd.write(Offset::new(3 << 12), b"shared").unwrap();
        let hypervisor = Hypervisor::new(&pool).unwrap();
        let vm = hypervisor.create_vm().unwrap();
        vm.bind(Gfn::new(0x100), &memfd, memfd.pages()).unwrap();
        let keeper = Keeper::new(&pool);
        let terms = SubscribeOptions::default().answer_within(SHORT).on_silence(on_silence);
        let it = memfd.subscribe_with(Arc::clone(&keeper) as _, terms.name("vfio0")).unwrap();
        let device = keeper.domain.attach_device();
        let world = Self { pool, memfd, hypervisor, vm, keeper, it, device };
        assert_eq!(world.seen().as_deref(), Some(&b"shared"[..]));
        world
    }

    /// What the device finds where the guest had page 3.
    fn seen(&self) -> Option<Vec<u8>> {
        let mut seen = [0; 6];
        self.device.read(at(0x103), &mut seen).ok().map(|()| seen.to_vec())
    }

    /// Another guest has the object, and a secret in page 3.
    fn is_given_to_the_next(&self) -> Vm {
        let next = self.hypervisor.create_vm().unwrap();
        next.bind(Gfn::new(0x900), &self.memfd, self.memfd.pages()).unwrap();
        let _ = self.memfd.convert(self.memfd.pages(), PRIVATE, PRESERVE).unwrap();
        next.create_vcpu().unwrap().store(at(0x903), SECRET).unwrap();
        next
    }
}

#[test]
fn who_keeps_the_places_of_a_guest_that_goes_is_cut_off() {
    for on_silence in [OnSilence::RefuseConversion, OnSilence::FenceOff] {
        for mood in BAD {
            let world = World::new(on_silence);
            *lock(&world.keeper.fence) = Ok(());
            world.keeper.is(mood);
            world.vm.teardown().unwrap();
            world.keeper.is(Mood::LetGo);
            assert_eq!(world.it.standing(), Standing::FencedOff, "{mood:?}");
            assert_eq!(world.keeper.domain.state(), DomainState::Detached);
            let _next = world.is_given_to_the_next();
            assert_eq!(world.seen(), None, "{mood:?}: a device reaches a private page");
        }
    }
}

#[test]
fn what_who_cannot_be_cut_off_may_reach_is_never_anybody_elses() {
    for mood in BAD {
        let World { pool, memfd, hypervisor, vm, keeper, it, device } =
            World::new(OnSilence::RefuseConversion);
        keeper.is(mood);
        // The last handle goes, and with it the guest.
        drop(vm);
        keeper.is(Mood::LetGo);
        assert_eq!(it.standing(), Standing::Lost, "{mood:?}");
        let next = hypervisor.create_vm().unwrap();
        let bound = next.bind(Gfn::new(0x900), &memfd, memfd.pages()).unwrap_err();
        let converted = memfd.convert(range(3, 1), PRIVATE, PRESERVE).unwrap_err();
        let punched = memfd.punch_hole(range(3, 1)).unwrap_err();
        for error in [bound, converted, punched] {
            assert_eq!(error.kind(), ErrorKind::SubscriberRefused, "{error}");
        }
        // It would say that it has let go of what it has at no place.
        drop(it);
        assert!(memfd.convert(range(3, 1), PRIVATE, PRESERVE).is_err());
        let size = memfd.size();
        drop(memfd);
        assert_eq!(pool.stat().quarantined, size);
        assert!(GuestMemfd::builder(size).create(&pool).is_err());
        assert!(device.read(at(0x103), &mut [0]).is_ok(), "this is what it keeps");
    }
}

#[test]
fn who_is_lost_is_found_again_by_a_fence() {
    let World { pool, memfd, vm, keeper, it, device, .. } = World::new(OnSilence::default());
    keeper.is(Mood::Refuse);
    vm.teardown().unwrap();
    assert_eq!(it.standing(), Standing::Lost);
    *lock(&keeper.fence) = Ok(());
    drop(it);
    let _ = memfd.convert(memfd.pages(), PRIVATE, PRESERVE).unwrap();
    assert!(device.read(at(0x103), &mut [0]).is_err());
    drop(memfd);
    assert_eq!(pool.stat().quarantined, ByteSize::default());
}

#[test]
fn others_follow_the_guest_whatever_one_of_them_does() {
    for mood in BAD {
        let world = World::new(OnSilence::default());
        let private = world.memfd.convert(range(7, 1), PRIVATE, PRESERVE).unwrap();
        assert_eq!(private.changed_pages(), 1);
        let others = [SHARED, PRIVATE].map(|side| {
            let domain = Domain::new(&world.pool, Places::Guest).unwrap();
            let terms = SubscribeOptions::default().side(side);
            let it = world.memfd.subscribe_with(Arc::new(domain.clone()), terms).unwrap();
            (domain, it)
        });
        let mapped =
            |domain: &Domain| domain.leaves().iter().map(|(gfns, _)| gfns.nr_pages()).sum::<u64>();
        assert_eq!(others.each_ref().map(|(domain, _)| mapped(domain)), [511, 1]);
        *lock(&world.keeper.fence) = Ok(());
        world.keeper.is(mood);
        world.vm.teardown().unwrap();
        assert_eq!(others.each_ref().map(|(domain, _)| mapped(domain)), [0, 0], "{mood:?}");
        assert_eq!(others.each_ref().map(|(_, it)| it.standing()), [Standing::Told; 2]);
        // And the next one.
        let _next = world.is_given_to_the_next();
        assert_eq!(others.each_ref().map(|(domain, _)| mapped(domain)), [0, 512]);
    }
}

#[test]
fn a_memslot_of_a_guest_that_lives_stays_or_goes_by_the_policy() {
    for (on_silence, mood) in [
        (OnSilence::RefuseConversion, Mood::Refuse),
        (OnSilence::RefuseConversion, Mood::Lose),
        (OnSilence::FenceOff, Mood::Refuse),
        (OnSilence::FenceOff, Mood::Lose),
    ] {
        let world = World::new(on_silence);
        *lock(&world.keeper.fence) = Ok(());
        let (memfd, offset) = world.vm.memslot(at(0x103)).unwrap();
        assert_eq!((memfd.name(), offset), (world.memfd.name(), Offset::new(3 << 12)));
        let id = gmem::hyp::MemslotId::from_u16(0).unwrap();
        world.keeper.is(mood);
        let outcome = world.vm.unbind(id);
        world.keeper.is(Mood::LetGo);
        if (on_silence, mood) == (OnSilence::FenceOff, Mood::Lose) {
            outcome.unwrap();
            assert_eq!(world.it.standing(), Standing::FencedOff);
        } else {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::SubscriberRefused);
            assert_eq!(world.seen().as_deref(), Some(&b"shared"[..]), "all is as before");
            world.vm.unbind(id).unwrap();
            assert_eq!(world.it.standing(), Standing::Told);
        }
        let _next = world.is_given_to_the_next();
        assert_eq!(world.seen(), None);
    }
}

/// A domain is meant for one object. With two a device misses pages, and gets none that it should not.
#[test]
fn two_objects_in_one_domain_take_each_others_place_and_nothing_more() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(4)).unwrap();
    let object = |bytes: &[u8; 6]| {
        let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(SHARED);
        let memfd = builder.create(&pool).unwrap();
        memfd.allocate(memfd.pages()).unwrap();
        memfd.write(Offset::new(3 << 12), bytes).unwrap();
        memfd
    };
    for nr_pages in [1, 512] {
        let (one, other) = (object(b"of one"), object(b"others"));
        let domain = Domain::new(&pool, Places::Object).unwrap();
        let device = domain.attach_device();
        let seen = || {
            let mut seen = [0; 6];
            device.read(at(3), &mut seen).ok().map(|()| seen)
        };
        let _one = one.subscribe(Arc::new(domain.clone())).unwrap();
        assert_eq!(seen().as_ref(), Some(b"of one"));
        let it = other.subscribe(Arc::new(domain.clone())).unwrap();
        let pages = range(if nr_pages == 1 { 3 } else { 0 }, nr_pages);
        for (turn, to) in [PRIVATE, SHARED, PRIVATE, SHARED].into_iter().enumerate() {
            let (changes, keeps) = [(&one, b"others"), (&other, b"of one")][turn / 2];
            let _ = changes.convert(pages, to, PRESERVE).unwrap();
            if to == PRIVATE {
                assert!(seen().is_none_or(|seen| seen == *keeps), "a private page is reached");
            }
        }
        let _ = one.convert(pages, PRIVATE, PRESERVE).unwrap();
        let _ = other.convert(pages, PRIVATE, PRESERVE).unwrap();
        assert_eq!(seen(), None);
        drop(it);
        let _ = one.convert(one.pages(), SHARED, PRESERVE).unwrap();
        assert_eq!(seen().as_ref(), Some(b"of one"), "alone it has its place");
    }
}
