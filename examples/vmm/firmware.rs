//! What the guest finds in its memory when it boots.

use gmem::addr::ByteSize;
use gmem::hyp::VmKind;
use gmem::range::PgoffRange;
use gmem::{ContentPolicy, GuestMemfd, Visibility};
use sha2::{Digest, Sha256};

use crate::Fallible;
use crate::layout::{self, PAYLOAD, PAYLOAD_BYTES, params};

/// Writes boot parameters and payload through the checked way, while they are shared. Those of a protected
/// guest are made private then. Returns how many conversions that took.
pub(crate) fn preload(
    memfd: &GuestMemfd,
    kind: VmKind,
    disk_bytes: u64,
    share_unit: ByteSize,
    stays_shared: bool,
) -> Fallible<u64> {
    let payload = make_payload();
    let mut raw = [0; params::BYTES];
    raw[params::AT_MAGIC..][..8].copy_from_slice(&params::MAGIC.to_le_bytes());
    let payload_bytes = payload.len() as u64;
    raw[params::AT_PAYLOAD_BYTES..][..8].copy_from_slice(&payload_bytes.to_le_bytes());
    raw[params::AT_DISK_BYTES..][..8].copy_from_slice(&disk_bytes.to_le_bytes());
    raw[params::AT_SHARE_UNIT..][..8].copy_from_slice(&share_unit.get().to_le_bytes());
    raw[params::AT_PAYLOAD_SHA256..][..32].copy_from_slice(&Sha256::digest(&payload));

    raw[params::AT_STAYS_SHARED..][..8].copy_from_slice(&u64::from(stays_shared).to_le_bytes());

    let mut conversions = 0;
    for (start, data) in [(params::BASE, &raw[..]), (PAYLOAD, &payload[..])] {
        let nr_pages = (data.len() as u64).div_ceil(4096);
        let pages = layout::pages_of(layout::frames(start, nr_pages)?)?;
        match kind {
            VmKind::Protected => {
                turn(memfd, pages, Visibility::Shared)?;
                memfd.write(pages.start_offset(), data)?;
                turn(memfd, pages, Visibility::Private)?;
                conversions += 2;
            }
            VmKind::NonProtected => memfd.write(pages.start_offset(), data)?,
        }
    }
    Ok(conversions)
}

/// Shares for good what the guest and the device will work in. Returns how many conversions that took.
pub(crate) fn share_areas(memfd: &GuestMemfd, share_unit: ByteSize) -> Fallible<u64> {
    let areas = layout::shared_areas(share_unit.get());
    for &(start, nr_pages) in &areas {
        turn(memfd, layout::pages_of(layout::frames(start, nr_pages)?)?, Visibility::Shared)?;
    }
    Ok(areas.len() as u64)
}

/// Converts pages, all of which are on the other side.
fn turn(memfd: &GuestMemfd, pages: PgoffRange, to: Visibility) -> Fallible<()> {
    let done = memfd.convert(pages, to, ContentPolicy::Preserve)?;
    match done.changed_pages() == pages.nr_pages() {
        true => Ok(()),
        false => Err(format!("preloading {pages} did not convert each page to {to}").into()),
    }
}

/// Stands for a kernel image: bytes without a pattern, the same in every run.
fn make_payload() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[7]
    };
    (0..PAYLOAD_BYTES).map(step).collect()
}
