//! What the kernel says of the mappings of this process (/proc/self/smaps, proc(5)).

use std::fs;
use std::ops::Range;

use crate::addr::ByteSize;

/// One mapping, as far as it is of interest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Area {
    addresses: Range<u64>,
    /// Of a memory file, mapped by huge entries.
    shared_huge: u64,
    /// Of anonymous memory, in huge pages.
    private_huge: u64,
}

/// All mappings at one moment; none where they cannot be read.
#[derive(Debug, Default)]
pub(crate) struct Smaps(Vec<Area>);

impl Smaps {
    /// Reads them.
    pub(crate) fn read() -> Self {
        // Miri's process has none.
        if cfg!(miri) {
            return Self::default();
        }
        Self(parse(&fs::read_to_string("/proc/self/smaps").unwrap_or_default()))
    }

    /// How much of a memory file these addresses map by huge entries.
    pub(crate) fn shared_huge(&self, addresses: &Range<u64>) -> ByteSize {
        self.at_least(addresses, |area| area.shared_huge)
    }

    /// How much anonymous memory at these addresses is in huge pages.
    pub(crate) fn private_huge(&self, addresses: &Range<u64>) -> ByteSize {
        self.at_least(addresses, |area| area.private_huge)
    }

    /// The sum of what must lie inside: a mapping that reaches out may have as much outside as fits
    /// there.
    fn at_least(&self, addresses: &Range<u64>, counter: fn(&Area) -> u64) -> ByteSize {
        let inside = |area: &Area| {
            let start = area.addresses.start.max(addresses.start);
            let shared = area.addresses.end.min(addresses.end).checked_sub(start)?;
            let outside = (area.addresses.end - area.addresses.start) - shared;
            Some(counter(area).saturating_sub(outside))
        };
        ByteSize::from_bytes(self.0.iter().filter_map(inside).sum())
    }
}

fn parse(text: &str) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for line in text.lines() {
        let Some((first, rest)) = line.split_once(' ') else { continue };
        if let Some(addresses) = addresses(first) {
            areas.push(Area { addresses, ..Area::default() });
            continue;
        }
        let Some(area) = areas.last_mut() else { continue };
        let bytes = || {
            let kib = rest.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok());
            kib.unwrap_or(0).saturating_mul(1 << 10)
        };
        match first {
            "ShmemPmdMapped:" => area.shared_huge = bytes(),
            "AnonHugePages:" => area.private_huge = bytes(),
            _ => {}
        }
    }
    areas
}

/// `7f00-8f00`.
fn addresses(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?).filter(|addresses| addresses.start <= addresses.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
200000-400000 rw-s 00000000 00:01 5 /memfd:gmem-arena (deleted)
Size:               2048 kB
AnonHugePages:         0 kB
ShmemPmdMapped:     2048 kB
VmFlags: rd wr sh mr mw me ms dd
400000-a00000 rw-s 00000000 00:01 5 /memfd:gmem-arena (deleted)
ShmemPmdMapped:     4096 kB
a00000-e00000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
";

    #[test]
    fn counters_of_mappings_inside_are_added() {
        let smaps = Smaps(parse(TEXT));
        assert_eq!(smaps.shared_huge(&(0x20_0000..0xa0_0000)), ByteSize::from_mib(6));
        assert_eq!(smaps.private_huge(&(0x20_0000..0xa0_0000)), ByteSize::from_bytes(0));
        assert_eq!(smaps.private_huge(&(0xa0_0000..0xe0_0000)), ByteSize::from_mib(2));
        assert_eq!(smaps.shared_huge(&(0xf0_0000..0xf1_0000)), ByteSize::from_bytes(0));
    }

    #[test]
    fn of_a_mapping_that_reaches_out_only_the_certain_part_counts() {
        let smaps = Smaps(parse(TEXT));
        assert_eq!(smaps.shared_huge(&(0x60_0000..0xa0_0000)), ByteSize::from_mib(2));
        assert_eq!(smaps.private_huge(&(0xc0_0000..0xe0_0000)), ByteSize::from_bytes(0));
    }

    #[test]
    fn what_is_no_smaps_has_no_mappings() {
        assert_eq!(parse("ShmemPmdMapped: 4 kB\nx-y z\n9-1 r\n\n"), []);
    }
}
