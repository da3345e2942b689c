//! Random scenarios, the same for the same seed. Nobody knows what they show.

use crate::scenario::{Expectation, Line, Scenario};
use crate::step::{GuestAct, HostAct, Ipa, Name, PAGE_SIZE, Place, Step, VcpuName};

/// Where all randomness comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub u64);

/// Pages that the guest has.
const NR_PAGES: u64 = 4;
/// Where it has them.
const BASE: u64 = 0x8000_0000;
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

fn steps(random: &mut Random) -> Vec<Step> {
    let backing = random.weighted(&[(2, "anon"), (1, "shared"), (2, "memfd")]).unwrap_or("anon");
    let kind = random.weighted(&[(4, "protected"), (1, "plain")]).unwrap_or("protected");
    let mut steps = read(&[
        &format!("memory m {backing} {NR_PAGES}"),
        &format!("vm v {kind}"),
        &format!("slot v 0 {BASE:#x} m[0..{NR_PAGES}]"),
        "vcpu v.0",
        "vcpu v.1",
        &format!("host store m[{}] {:#x}", random.below(NR_PAGES), random.byte()),
    ]);
    for _ in 0..NR_EVENTS {
        steps.push(event(random, backing == "memfd"));
    }
    steps.extend(read(&["locked", "close v.0", "close v.1", "close v", "locked"]));
    for page in 0..NR_PAGES {
        let place = Place { memory: Name::m(), page, offset: 0 };
        steps.push(Step::Host(HostAct::Load, place));
    }
    steps
}

fn event(random: &mut Random, has_file: bool) -> Step {
    let page = random.below(NR_PAGES);
    let ipa = Ipa(BASE + page * PAGE_SIZE);
    let place = Place { memory: Name::m(), page, offset: 0 };
    let byte = random.byte();
    if random.below(2) == 0 {
        let act = random.weighted(&[
            (4, GuestAct::Load(ipa)),
            (4, GuestAct::Store(ipa, byte)),
            (3, GuestAct::Share(ipa)),
            (3, GuestAct::Unshare(ipa)),
            (1, GuestAct::Share(Ipa(ipa.0 + 8))),
            (1, GuestAct::Hvc([0xc600_0004, ipa.0, 1, 0])),
            (2, GuestAct::Resume),
        ]);
        let index = random.below(2) as u8;
        let vcpu = VcpuName { vm: Name::v(), index };
        return act.map_or(Step::Locked, |act| Step::Guest(vcpu, act));
    }
    let file = if has_file { 1 } else { 0 };
    let act = random.weighted(&[
        (6, HostAct::Load),
        (6, HostAct::Store(byte)),
        (3, HostAct::Write),
        (3, HostAct::Read(byte)),
        (1, HostAct::VmRead),
        (1, HostAct::VmWrite(byte)),
        (1, HostAct::MemRead),
        (1, HostAct::Splice),
        (file, HostAct::FileRead),
        (file, HostAct::FileWrite(byte)),
        (1, HostAct::Discard),
        (1, HostAct::Lock),
    ]);
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
        let nr_lines = 6 + NR_EVENTS + 5 + NR_PAGES;
        assert!(scenarios.iter().all(|scenario| scenario.lines.len() as u64 == nr_lines));
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
            "lock",
        ] {
            let nr_with = all.iter().filter(|text| text.contains(word)).count();
            assert!(nr_with >= 5, "`{word}` is in {nr_with} of 200");
        }
    }
}
