//! Every number of the list of rules, and who checks it.

use super::*;
use crate::hyp::el2::invariants::trace::STEP_RULES;
use crate::hyp::el2::invariants::{HOST_RULES, RULES};

type Tests = &'static [fn()];

/// Rules that need a stage of their own, and the tests that set it.
const STAGED: &[(&str, Tests)] = &[
    (
        "15 which errno is a matter of the state before, in one order",
        &[
            shares::share_hyp_wants_the_hosts_own_memory,
            shares::unshare_hyp_wants_a_page_that_is_shown_and_not_pinned,
            shares::the_secure_world_gives_back_what_it_has,
            np::shares_check_arguments_then_memory_then_the_guest_then_the_host,
            np::a_block_is_shown_and_hidden_as_one,
            pvm::donation_checks_the_list_then_the_host_then_the_guest_then_the_tables,
            pvm::pages_of_a_dying_guest_come_back_cleared_but_for_what_the_host_saw,
            pvm::force_destroys_a_page_that_is_a_guests_alone,
            life::a_vm_is_made_of_what_checks_let_through_in_order,
            life::a_vcpu_is_made_of_what_checks_let_through_in_order,
            profiles::blocks_are_given_where_blocks_begin_and_all_or_nothing,
            android::a_list_with_one_bad_entry_gives_nothing,
        ],
    ),
    (
        "16 there and back is nothing",
        &[property::there_and_back_is_nothing, pvm::a_guest_shows_a_page_and_hides_it_again],
    ),
    ("20 an entry is broken before it is made", &[property::any_host_and_guests_keep_the_rules]),
    ("21 no secret leaves", &[taint::secrets_stay, taint::a_secret_that_leaves_is_seen]),
    (
        "27 a destroyed page is a fault when the guest goes there, and not before",
        &[pvm::force_destroys_a_page_that_is_a_guests_alone],
    ),
    (
        "30 teardown goes in one order",
        &[life::teardown_goes_in_one_order_and_gives_everything_back],
    ),
    (
        "35 one donation and one more try are enough; so is one reclaim",
        &[
            guests::a_share_of_nothing_is_a_fault_first_and_then_made_again,
            access::the_kernels_own_pointer_destroys_the_page,
        ],
    ),
    (
        "36 no argument stops EL2",
        &[
            random::mainline_stands_anything,
            random::android_stands_anything,
            random::huge_pages_stand_anything,
            random::a_call_that_does_not_exist_is_said_not_to,
        ],
    ),
    ("37 nobody waits for ever", &[threads::nobody_waits_for_ever]),
    (
        "53 a guest's blocks are the host's blocks",
        &[profiles::a_block_is_one_entry_on_both_sides_until_it_is_split],
    ),
];

/// The numbers at the beginning of a name: "2, 3 an annotation".
fn numbers(name: &str) -> impl Iterator<Item = &str> {
    let words = name.split([' ', ',']).filter(|word| !word.is_empty());
    words.take_while(|word| word.starts_with(|c: char| c.is_ascii_digit()))
}

#[test]
fn every_number_has_somebody_who_checks_it() {
    let always = RULES.iter().map(|(name, _)| *name);
    let steps = STEP_RULES.iter().map(|(name, _)| *name);
    let hosts = HOST_RULES.iter().map(|(name, _)| *name);
    let staged = STAGED.iter().filter(|(_, tests)| !tests.is_empty()).map(|(name, _)| *name);
    let names: Vec<_> = always.chain(steps).chain(hosts).chain(staged).collect();
    let checked: Vec<_> = names.iter().flat_map(|name| numbers(name)).collect();
    let wanted = (1..=40).map(|nr| nr.to_string()).chain(["1b", "53"].map(str::to_owned));
    for number in wanted {
        let nr = checked.iter().filter(|&checked| *checked == number).count();
        assert_eq!(nr, 1, "{number} of {names:#?}");
    }
    // The specification has no number: it is all of them, told otherwise.
    assert_eq!(checked.len(), 42);
    assert!(RULES.iter().any(|(name, _)| *name == "the tables refine the specification"));
}
