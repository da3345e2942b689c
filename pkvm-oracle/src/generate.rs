//! Random scenarios, the same for the same seed. Nobody knows what they show.

use crate::name::{Ipa, Name, PAGE_SIZE, Place, VcpuName};
use crate::scenario::{Expectation, Line, Scenario};
use crate::step::{GuestAct, HostAct, MEM_SHARE, MEM_UNSHARE, Step};

/// Where all randomness comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub u64);

/// Pages that the guest has.
const NR_PAGES: u64 = 4;
/// Where it has them.
const BASE: u64 = 0x8000_0000;
/// Where another guest has the same.
const OTHER_BASE: u64 = 0x9000_0000;
/// What happens between the beginning and the end of a scenario.
const NR_EVENTS: u64 = 24;

/// So many scenarios, named by the seed and their number.
#[must_use]
pub fn generate(seed: Seed, nr_scenarios: usize) -> Vec<Scenario> {
    (0..nr_scenarios)
        .map(|at| {
            let mut random = Random(seed.0 ^ (at as u64).wrapping_mul(0xd134_2543_de82_ef95));
            let name = format!("random-{}-{at}", seed.0);
            let lines = steps(&mut random).into_iter().enumerate();
            let line = |(at, step)| Line { number: at + 2, step, expected: Expectation::Unknown };
            Scenario { name, lines: lines.map(line).collect() }
        })
        .collect()
}

/// Splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn byte(&mut self) -> u8 {
        // Never 0, which is what a wiped page shows.
        self.below(255) as u8 + 1
    }

    /// One of these, as often as its weight says.
    fn weighted<T: Copy>(&mut self, choices: &[(u64, T)]) -> Option<T> {
        let mut at = self.below(choices.iter().map(|(weight, _)| weight).sum());
        for &(weight, choice) in choices {
            match at.checked_sub(weight) {
                Some(rest) => at = rest,
                None => return Some(choice),
            }
        }
        None
    }
}

/// What a scenario has, of which its events choose.
struct Cast {
    has_file: bool,
    /// vCPUs, with where their guests have the memory.
    vcpus: Vec<(VcpuName, u64)>,
}

/// Nobody looks at it.
const UPPER_HALF: u64 = 0xfeed_beef << 32;

const KINDS: &[(u64, &str)] = &[(4, "protected"), (1, "plain")];

fn steps(random: &mut Random) -> Vec<Step> {
    let backing = random.weighted(&[(2, "anon"), (1, "shared"), (2, "memfd")]).unwrap_or("anon");
    let kind = random.weighted(KINDS).unwrap_or("protected");
    let vcpu = |vm, index, base| (VcpuName { vm, index }, base);
    let mut cast = Cast {
        has_file: backing == "memfd",
        vcpus: vec![vcpu(Name::v(), 0, BASE), vcpu(Name::v(), 1, BASE)],
    };
    let mut steps = read(&[
        &format!("memory m {backing} {NR_PAGES}"),
        &format!("vm v {kind}"),
        &format!("slot v 0 {BASE:#x} m[0..{NR_PAGES}]"),
        "vcpu v.0",
        "vcpu v.1",
        &format!("host store m[{}] {:#x}", random.below(NR_PAGES), random.byte()),
    ]);
    let mut last = vec!["locked", "close v.0", "close v.1", "close v", "locked"];
    // Two guests that want the same pages.
    if random.below(3) == 0 {
        let kind = random.weighted(KINDS).unwrap_or("protected");
        steps.extend(read(&[
            &format!("vm w {kind}"),
            &format!("slot w 0 {OTHER_BASE:#x} m[0..{NR_PAGES}]"),
            "vcpu w.0",
        ]));
        cast.vcpus.push(vcpu(Name::w(), 0, OTHER_BASE));
        last.extend(["guest w.0 resume", "close w.0", "close w", "locked"]);
    }
    for _ in 0..NR_EVENTS {
        steps.push(event(random, &cast));
    }
    steps.extend(read(&last));
    for page in 0..NR_PAGES {
        let place = Place { memory: Name::m(), page, offset: 0 };
        steps.push(Step::Host(HostAct::Load, place));
    }
    steps
}

fn event(random: &mut Random, cast: &Cast) -> Step {
    let page = random.below(NR_PAGES);
    let byte = random.byte();
    if random.below(2) == 0 {
        let (vcpu, base) = &cast.vcpus[random.below(cast.vcpus.len() as u64) as usize];
        let ipa = Ipa(base + page * PAGE_SIZE);
        let act = random.weighted(&[
            (8, GuestAct::Load(ipa)),
            (8, GuestAct::Store(ipa, byte)),
            (7, GuestAct::Share(ipa)),
            (6, GuestAct::Unshare(ipa)),
            (1, GuestAct::Share(Ipa(ipa.0 + 8))),
            (1, GuestAct::Share(Ipa(ipa.0 + NR_PAGES * PAGE_SIZE))),
            (2, GuestAct::Hvc([MEM_UNSHARE, ipa.0, 1, 0])),
            (2, GuestAct::Hvc([UPPER_HALF | MEM_SHARE, ipa.0, 0, 0])),
            (2, GuestAct::Resume),
        ]);
        return act.map_or(Step::Locked, |act| Step::Guest(vcpu.clone(), act));
    }
    let file = if cast.has_file { 2 } else { 0 };
    let act = random.weighted(&[
        (12, HostAct::Load),
        (12, HostAct::Store(byte)),
        (6, HostAct::Write),
        (6, HostAct::Read(byte)),
        (2, HostAct::VmRead),
        (2, HostAct::VmWrite(byte)),
        (1, HostAct::MemRead),
        (1, HostAct::MemWrite(byte)),
        (1, HostAct::Splice),
        (1, HostAct::RingLoad),
        (1, HostAct::RingStore(byte)),
        (1, HostAct::Pin),
        (file, HostAct::FileRead),
        (file / 2, HostAct::SendFile),
        (file, HostAct::FileWrite(byte)),
        (file, HostAct::Punch),
        (1, HostAct::ForkLoad),
        (2, HostAct::Discard),
        (1, HostAct::Protect),
        (1, HostAct::Unmap),
        (2, HostAct::Lock),
        (1, HostAct::Unlock),
    ]);
    let place = Place { memory: Name::m(), page, offset: 0 };
    act.map_or(Step::Locked, |act| Step::Host(act, place))
}

/// Steps as a person writes them. What cannot be read is left out; the tests see to it that nothing
/// is.
fn read(lines: &[&str]) -> Vec<Step> {
    lines.iter().filter_map(|line| line.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::parse;

    #[test]
    fn a_seed_is_a_list_of_scenarios() {
        let first = generate(Seed(7), 30);
        assert_eq!(first, generate(Seed(7), 30));
        assert_ne!(first, generate(Seed(8), 30));
        for (at, scenario) in first.iter().enumerate() {
            assert!(first[..at].iter().all(|other| other.lines != scenario.lines));
            let again = parse(&scenario.to_string()).unwrap().remove(0);
            assert_eq!(again.lines, scenario.lines);
        }
    }

    #[test]
    fn scenarios_are_whole_and_vary() {
        let scenarios = generate(Seed(1), 200);
        let alone = 6 + NR_EVENTS + 5 + NR_PAGES;
        let nr_lines = |scenario: &Scenario| scenario.lines.len() as u64;
        assert!(scenarios.iter().all(|one| [alone, alone + 7].contains(&nr_lines(one))));
        assert!(scenarios.iter().filter(|one| nr_lines(one) > alone).count() > 40);
        let all: Vec<_> = scenarios.iter().map(ToString::to_string).collect();
        for word in [
            "anon",
            "shared",
            "memfd",
            "plain",
            "guest v.0 load",
            "guest v.1 store",
            "share",
            "unshare",
            "hvc",
            "resume",
            "host load",
            "host store",
            "write",
            "read",
            "vm-read",
            "vm-write",
            "mem-read",
            "splice",
            "file-read",
            "file-write",
            "discard",
            "host lock",
            "unlock",
            "punch",
            "protect",
            "unmap",
            "fork-load",
            "mem-write",
            "host pin",
            "ring-load",
            "ring-store",
            "sendfile",
            "hvc 0xfeedbeefc6000003",
            "guest w.0 store",
            "guest w.0 share",
        ] {
            let nr_with = all.iter().filter(|text| text.contains(word)).count();
            assert!(nr_with >= 5, "`{word}` is in {nr_with} of 200");
        }
    }
}
