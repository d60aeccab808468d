/* Browsers start no workers for pages that are opened from disk. There the search's script runs in a
   hidden frame instead, which exchanges the same messages. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #ready;

    constructor(script) {
      super();
      this.#frame.hidden = true;
      this.#ready = new Promise((resolve) => {
        this.#frame.onload = () => this.#load(script, resolve);
      });
      this.#frame.srcdoc = "";
      document.body.append(this.#frame);
    }

    #load(script, resolve) {
      const { contentWindow, contentDocument } = this.#frame;
      contentWindow.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data }));
      const element = contentDocument.createElement("script");
      element.onload = resolve;
      element.src = script;
      contentDocument.head.append(element);
    }

    async postMessage(data) {
      await this.#ready;
      this.#frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
