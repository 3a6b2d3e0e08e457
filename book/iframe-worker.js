// A browser starts no worker from a file. Opened without a server, the book's search works in a hidden frame instead.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }));
    this.inside = frame.contentWindow;
    this.ready = new Promise((resolve) => { this.inside.ready = resolve; });
    this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
    this.inside.document.write(`<script src="${url}" onload="ready()"></script>`);
    this.inside.document.close();
  }
  postMessage(data) { this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data }))); }
};
