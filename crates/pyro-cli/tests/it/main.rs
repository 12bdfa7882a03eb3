//! The `pyro` command with real machines: each test is a sentence of the contract.
//!
//! All tests share the environments in the target directory, which the first one builds; each has a state
//! directory of its own, so that the cap of one is not another's.

mod backend;
mod chaos;
mod commands;
mod doctor;
mod drops;
mod failures;
mod kill;
mod ledger;
mod network;
mod odd_host;
mod ports;
mod power_loss;
mod ready;
mod run;
mod secrets;
mod stuck;
mod support;
mod task;
mod template;
mod waits;
