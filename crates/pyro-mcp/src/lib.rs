//! The MCP server of pyro: its engine as tools for agents, over stdio or streamable HTTP.
//!
//! A tool is a typed request in and a typed result out: its schemas are made from the types, so that what is
//! advertised is what is checked. This crate touches neither stdin nor stdout: whoever serves gives it the streams,
//! and what it has to tell beside the protocol goes through `tracing`.

mod call;
mod failure;
mod http;
mod install;
mod progress;
mod prompts;
mod resources;
mod server;
mod text;
mod tools;

pub use failure::Failure;
pub use http::{HttpOptions, serve_http};
pub use install::{Host, InstallError, Installation, Installed};
pub use server::{Profile, Server};
