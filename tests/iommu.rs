//! The simulated IOMMU: what its domain maps, and what its devices reach.

#[path = "iommu/races.rs"]
mod races;

use std::sync::Arc;

use gmem::addr::{Access, ByteSize, Gfn, Ipa, Offset, Pgoff};
use gmem::error::Errno;
use gmem::hyp::iommu::{DmaFaultKind, Domain, DomainState, Places};
use gmem::hyp::{Hypervisor, Model};
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, OnSilence, PartSpec,
    Residency, Standing, SubscribeOptions, Subscriber, Visibility, Zone,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
/// Two folios, and a tail.
const PAGES: u64 = 2 * 512 + 8;

const BOTH: [Zone; 2] = [Zone::Movable, Zone::Normal];

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn at(page: u64) -> Ipa {
    Gfn::new(page).ipa()
}

fn pool() -> FolioPool {
    let part = || PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(8));
    FolioPool::builder().part(part(), Zone::Normal).part(part(), Zone::Movable).create().unwrap()
}

fn object(pool: &FolioPool, zones: &[Zone]) -> GuestMemfd {
    let memfd = GuestMemfd::builder(ByteSize::from_pages(PAGES))
        .zones(zones)
        .initial(Visibility::Shared)
        .create(pool)
        .unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    memfd
}

/// The pages that a domain maps, one by one.
fn mapped(domain: &Domain) -> Vec<u64> {
    domain.leaves().iter().flat_map(|(at, _)| at.iter().map(Gfn::get)).collect()
}

fn on_side(memfd: &GuestMemfd, side: Visibility) -> Vec<u64> {
    let infos = memfd.snapshot(memfd.pages()).unwrap();
    infos
        .filter(|(_, info)| info.visibility == side && info.residency == Residency::Resident)
        .flat_map(|(pages, _)| pages.iter().map(Pgoff::get).collect::<Vec<_>>())
        .collect()
}

#[test]
fn whole_folios_are_large_leaves_and_split_where_a_page_leaves() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(8)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(8)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let _it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    let sizes = || {
        let mut sizes: Vec<u64> = domain.leaves().iter().map(|(at, _)| at.nr_pages()).collect();
        sizes.sort();
        (
            sizes.iter().filter(|&&size| size == 1).count(),
            sizes.last().copied().unwrap(),
            sizes.len(),
        )
    };
    assert_eq!(sizes(), (0, 512, 4));
    let _ = memfd.convert(range(600, 1), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(sizes(), (511, 512, 3 + 511));
    let _ = memfd.convert(range(512, 512), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(sizes(), (0, 512, 3));
    let _ = memfd.convert(range(512, 512), Visibility::Shared, PRESERVE).unwrap();
    assert_eq!(sizes(), (0, 512, 4), "a folio that comes back whole is one leaf");
    for (at, frames) in domain.leaves() {
        assert_eq!(at.nr_pages(), frames.nr_pages());
    }
}

#[test]
fn a_device_reaches_what_is_shared_and_faults_elsewhere() {
    let pool = pool();
    let memfd = object(&pool, &BOTH);
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    let device = domain.attach_device();
    memfd.write(Offset::new(4090), b"across pages").unwrap();
    let mut seen = [0; 12];
    device.read(Ipa::new(4090), &mut seen).unwrap();
    assert_eq!(&seen, b"across pages");
    device.write(at(3), b"from the device").unwrap();
    let mut seen = [0; 15];
    memfd.read(Offset::new(3 << 12), &mut seen).unwrap();
    assert_eq!(&seen, b"from the device");

    let _ = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap();
    memfd.punch_hole(range(5, 1)).unwrap();
    for (page, access) in [(3, Access::Read), (5, Access::Write), (PAGES, Access::Read)] {
        let fault = match access {
            Access::Write => device.write(at(page), &[1]),
            _ => device.read(at(page), &mut [0]),
        };
        let fault = fault.unwrap_err();
        assert_eq!(
            (fault.at, fault.access, fault.kind),
            (at(page), access, DmaFaultKind::NotMapped)
        );
    }
    assert_eq!((domain.nr_faults(), domain.last_faults().len()), (3, 3));
    assert!(device.read(Ipa::new(u64::MAX), &mut [0; 2]).is_err());
    // A hole is filled by the host, and handed out with that.
    memfd.write(Offset::new(5 << 12), &[7]).unwrap();
    let mut seen = [0];
    device.read(at(5), &mut seen).unwrap();
    assert_eq!(seen, [7]);
    drop(it);
    assert_eq!(domain.leaves(), []);
}

#[test]
fn a_device_follows_pages_that_move_to_other_frames() {
    let pool = pool();
    let memfd = object(&pool, &BOTH);
    let _ = memfd.migrate(memfd.pages(), Zone::Movable).unwrap();
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let _it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    let device = domain.attach_device();
    device.write(at(700), b"before").unwrap();
    let before = domain.leaves();
    let moved = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
    assert!(moved.moved > ByteSize::default() && moved.refused.is_empty(), "{moved:?}");
    assert_ne!(domain.leaves(), before);
    let mut seen = [0; 6];
    device.read(at(700), &mut seen).unwrap();
    assert_eq!(&seen, b"before");
    device.write(at(700), b"behind").unwrap();
    memfd.read(Offset::new(700 << 12), &mut seen).unwrap();
    assert_eq!(&seen, b"behind");
}

#[test]
fn devices_of_a_guest_find_pages_where_it_sees_them() {
    Model::ALL.into_iter().for_each(devices_of_a_guest);
}

fn devices_of_a_guest(model: Model) {
    let pool = pool();
    let memfd = GuestMemfd::builder(ByteSize::from_pages(64)).create(&pool).unwrap();
    let trusted = Domain::new(&pool, Places::Guest).unwrap();
    let host = Domain::new(&pool, Places::Guest).unwrap();
    let private = SubscribeOptions::default().side(Visibility::Private).name("tdisp");
    let _trusted = memfd.subscribe_with(Arc::new(trusted.clone()), private).unwrap();
    let _host = memfd.subscribe(Arc::new(host.clone())).unwrap();
    let vm = Hypervisor::with(&pool, model).unwrap().create_vm().unwrap();
    vm.bind(Gfn::new(0x80000), &memfd, memfd.pages()).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    vcpu.store(at(0x80003), b"to a device that I trust").unwrap();
    let mut seen = [0; 24];
    trusted.attach_device().read(at(0x80003), &mut seen).unwrap();
    assert_eq!(&seen, b"to a device that I trust");
    assert!(host.attach_device().read(at(0x80003), &mut seen).is_err());
    assert!(trusted.attach_device().read(at(3), &mut seen).is_err());
}

#[test]
fn a_domain_that_was_fenced_off_lets_nothing_through_until_it_is_attached_again() {
    let pool = pool();
    let memfd = object(&pool, &BOTH);
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let mute = Arc::new(Mute(domain.clone()));
    let terms = SubscribeOptions::default().on_silence(OnSilence::FenceOff);
    let it = memfd.subscribe_with(mute, terms).unwrap();
    let device = domain.attach_device();
    device.read(at(9), &mut [0]).unwrap();
    let _ = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap();
    assert_eq!((it.standing(), domain.state()), (Standing::FencedOff, DomainState::Detached));
    for page in [3, 9] {
        let fault = device.read(at(page), &mut [0]).unwrap_err();
        assert_eq!(fault.kind, DmaFaultKind::Detached);
    }
    drop(it);
    domain.reattach().unwrap();
    let _it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    device.read(at(9), &mut [0]).unwrap();
    assert_eq!(mapped(&domain), on_side(&memfd, Visibility::Shared));
}

/// A domain whose keeper never answers.
#[derive(Debug)]
struct Mute(Domain);

impl Subscriber for Mute {
    fn revoke(&self, _: &[HandOutRun], ack: Ack) {
        drop(ack);
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.0.grant(runs);
    }

    fn fence(&self) -> Result<(), Errno> {
        self.0.fence()
    }
}
