// The API as the page uses it: keys, errors in one readable form, and the time an answer took.

const KEY = "clip-ray-key";
const TIMEOUT_MS = 40_000; // the server ends a request after 30 s and says so; this is for silence

/** A refusal or failure with a message for the reader. */
export class Problem extends Error {
  constructor(message, { status = 0, param = "", requestId = "" } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.requestId = requestId;
  }

  /** Return the message with what an operator needs to find the request. */
  text() {
    const facts = [
      this.param,
      this.status && `HTTP ${this.status}`,
      this.requestId && `request ${this.requestId}`,
    ].filter(Boolean);
    return facts.length ? `${this.message} (${facts.join(", ")})` : this.message;
  }
}

export const key = {
  /** Return the tab's key, or null. Session storage only: it ends with the tab. */
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** The API of this server; `askKey(problem)` resolves to a new key, or null if there is none. */
export class Api {
  constructor(askKey) {
    this.askKey = askKey;
    this.asking = null;
  }

  /**
   * Call a route; without a body it is a GET. Asks for a key after a 401 and tries again.
   * Returns {answer, ms}, where ms is the time of the request that succeeded.
   */
  async call(path, body, signal) {
    for (;;) {
      const used = key.get();
      const start = performance.now();
      const response = await send(path, body, used, signal);
      if (response.ok) {
        const answer = await json(response);
        return { answer, ms: performance.now() - start };
      }
      const problem = await problemOf(response);
      if (response.status !== 401) throw problem;
      // Another request may have got a key meanwhile; two that wait share one dialog.
      if (key.get() === used && !(await this.newKey(problem, used))) throw problem;
    }
  }

  async newKey(problem, used) {
    this.asking ??= this.askKey(used ? problem : null).finally(() => (this.asking = null));
    const value = await this.asking;
    if (value) key.set(value);
    return Boolean(value);
  }
}

async function send(path, body, bearer, signal) {
  const headers = bearer ? { authorization: `Bearer ${bearer}` } : {};
  const options = { headers, cache: "no-store", redirect: "error" };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const silence = new AbortController();
  const timer = setTimeout(() => silence.abort(), TIMEOUT_MS);
  const cancel = () => silence.abort();
  signal?.addEventListener("abort", cancel);
  try {
    return await fetch(path, { ...options, signal: silence.signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    const reason = silence.signal.aborted ? `after ${TIMEOUT_MS / 1000} s` : error.message;
    throw new Problem(`The server did not answer: ${reason}`);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", cancel);
  }
}

async function json(response) {
  try {
    return await response.json();
  } catch {
    throw new Problem("The answer was not JSON", facts(response));
  }
}

async function problemOf(response) {
  const text = await response.text();
  const wait = response.headers.get("retry-after");
  const hint = wait ? ` Try again in ${wait} s.` : "";
  try {
    const { message, param, request_id: requestId } = JSON.parse(text).error;
    return new Problem(sentence(message) + hint, { status: response.status, param, requestId });
  } catch {
    // A proxy in front answers in plain text.
    const words = text.startsWith("<") ? "" : text.slice(0, 200);
    const message = words || `The server refused the request${hint ? "." : ""}`;
    return new Problem(message + hint, facts(response));
  }
}

function facts(response) {
  return { status: response.status, requestId: response.headers.get("x-request-id") ?? "" };
}

function sentence(message) {
  const text = String(message);
  return text.charAt(0).toUpperCase() + text.slice(1);
}
