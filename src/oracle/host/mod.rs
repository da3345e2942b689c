//! The same for the host's side of one object: views of every kind, memory that is lent, memslots of a guest,
//! and subscribers with domains and devices, who answer, refuse, are silent or leave.
//!
//! After each step the model says what each view may touch, what each domain has mapped (exactly the pages of
//! its side), which memslots there are, what is pinned, and what the step itself is answered, errno and all. It
//! looks where folios have come to lie, and insists from then on.
//!
//! | file | holds |
//! |---|---|
//! | `action` | the actions, and what their numbers mean |
//! | `step` | an action with its claims settled, and answers |
//! | `model` | pages, views, pins, what a call does to them |
//! | `guest` | memslots, and what the guest was given |
//! | `keepers` | subscribers: who is asked, and what each has |
//! | `mistake` | rules that the model can be told to get wrong |
//! | `warden` | a real subscriber, with manners as they are asked for |
//! | `real` | the same steps on the library |
//! | `compare`, `run` | the comparison, and what drives it |

mod action;
mod compare;
mod guest;
mod keepers;
mod mistake;
mod model;
mod real;
mod run;
mod step;
mod warden;

pub use action::{GuestAct, HostAction, Mood, Silence, Spot, Terms, Time};
pub use mistake::HostMistake;
pub use run::{
    HostCoverage, HostDisagreement, HostInspect, run_host, run_host_mistaken, shrink_host,
};
