// Browsers allow no web worker in a page that is opened from a folder (file://). There a hidden frame runs the script of
// the worker, so that search works. Its name keeps the theme from loading a script like this one from elsewhere.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!DOCTYPE html><body></body>";
      this.frame = frame;
      this.view = new Promise((resolve, reject) => {
        frame.onload = () => {
          const view = frame.contentWindow, script = view.document.createElement("script");
          view.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
          script.onload = () => resolve(view);
          script.onerror = () => reject(new Error(`${url} was not loaded.`));
          script.src = url;
          view.document.body.append(script);
        };
      });
      document.body.append(frame);
    }

    postMessage(data) {
      this.view.then(view => view.dispatchEvent(new MessageEvent("message", {data})));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
