//! The text of a policy file. What it includes is not read.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use pyro_net::policy::Rule;
use pyro_net::policy::PolicyText;

fuzz_target!(|text: &str| {
    if let Ok(policy) = PolicyText::parse(text, Path::new("policy.toml")) {
        for rule in policy.allow.iter().chain(&policy.deny) {
            drop(rule.parse::<Rule>());
        }
    }
});
