//! A network rule: what is read, prints as text that is the same rule, and is judged by any name without a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pyro_net::policy::{Policy, Rule};

fuzz_target!(|input: (&str, &str, u16)| {
    let (text, name, port) = input;
    match text.parse::<Rule>() {
        Ok(rule) => {
            assert_eq!(rule.to_string().parse::<Rule>().as_ref(), Ok(&rule));
            let policy = Policy::new(false, vec![rule], Vec::new()).expect("one rule");
            if policy.by_name(name, port).allowed {
                assert!(policy.answers(name));
            }
        }
        Err(error) => assert!(error.to_string().len() < 16 << 10),
    }
});
