// Preloaded into a client that has no option for a header: each request carries the server's token.
const plain = globalThis.fetch;
globalThis.fetch = (input, init = {}) => {
    const headers = new Headers(init.headers ?? (input instanceof Request ? input.headers : undefined));
    headers.set('authorization', `Bearer ${process.env.PYRO_MCP_TOKEN}`);
    return plain(input, { ...init, headers });
};
