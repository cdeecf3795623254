// SPDX-License-Identifier: Apache-2.0

// The verifier's own thread: it gets the module's bytes once, then questions. What
// hostile evidence can do at worst is to end it; the page then starts another.
"use strict";

importScripts("wasm_exec.js");

let alive = false;

onmessage = async ({ data }) => {
  try {
    if (data.module) {
      const go = new Go();
      const { instance } = await WebAssembly.instantiate(data.module, go.importObject);
      go.run(instance).then(() => { alive = false; });
      alive = true;
      postMessage({ ready: true, version: String(dstackVersion) });
      return;
    }
    if (!alive) throw new Error("the verifier has stopped");
    const start = performance.now();
    const answer = dstackVerify(data.evidence, data.options);
    postMessage({ id: data.id, answer, milliseconds: performance.now() - start });
  } catch (err) {
    postMessage({ id: data.id, failed: String(err) });
  }
};
