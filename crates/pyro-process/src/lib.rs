//! Child processes that never outlive their owner.
//!
//! Every helper that pyro starts (a VMM, a package tool) is started here, so that the rule "nothing survives
//! its owner" is kept in one place:
//!
//! - the kernel sends the child `SIGKILL` when the owner dies (`PR_SET_PDEATHSIG`). The kernel ties that
//!   signal to the *thread* that forked, so all children are forked by one thread that never ends;
//! - an owner that died between fork and that call is noticed by the child itself;
//! - the child gets only the file descriptors that it was given by name, each under a number that the caller
//!   chose; all others are closed when it executes;
//! - an owner that ignores `SIGCHLD`, or has a handler for it that may reap every child, gets a *keeper* between itself
//!   and the child, which tells how the child has ended;
//! - stdin is the null device unless the caller gave another.
//!
//! Whoever must signal a child later does so through its pidfd ([`Child::pidfd`]), never through a number.

mod child;
mod descriptors;
mod jail;
mod limits;
mod other;
mod program;
mod report;
mod spawn;

pub use child::{Child, Exit, Output, output};
pub use descriptors::{HandOverError, descriptors_from_child};
pub use jail::{Bind, Jail, has_landlock};
pub use limits::{make_file_limits_errors, raise_file_limit};
pub use other::{Holder, Other, lock_holder, lock_within};
pub use rustix::process::Resource;
pub use rustix::thread::UnshareFlags as Namespaces;
pub use spawn::Spawn;
