//! What a step may have changed, and what must hold after it.

use super::super::El2;
use super::super::invariants::trace::Snapshot;
use super::Kind;

/// What is wrong, if something is.
pub(super) fn wrong(el2: &El2, before: &Snapshot, after: &Snapshot, kind: Kind) -> Option<String> {
    let spared = match kind {
        Kind::HostDestroyed(pfn) => Some(pfn),
        _ => None,
    };
    let found = match kind {
        Kind::Refused => before.difference(after),
        Kind::RefusedAfterClearing => before.states_difference(after),
        Kind::HostReached(pfn) if !before.is_reached_by_host(pfn) => {
            Some(format!("the host reached {pfn:?}, which it had not"))
        }
        Kind::HostDestroyed(pfn) if before.is_reached_by_host(pfn) => {
            Some(format!("the host destroyed {pfn:?}, which it could reach"))
        }
        _ => None,
    };
    found
        .or_else(|| match kind {
            Kind::Many => None,
            _ => before.missing_edge(after),
        })
        .or_else(|| match kind {
            // The one is its own, the other the incident that only an IOMMU prevents.
            Kind::GuestStored | Kind::DeviceStored => None,
            _ => before.private_bytes_changed(after, el2),
        })
        .or_else(|| before.not_cleared(after, el2, spared))
        .or_else(|| el2.check().into_iter().next())
}
