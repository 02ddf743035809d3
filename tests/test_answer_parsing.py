"""Answers as models write them: each table holds texts with the value that a person reads in them."""

import time
import unicodedata

import pytest

from idavlm.evaluation import is_refusal, parse_image_number, parse_letter, parse_yes_no
from idavlm.evaluation.judge import parse_score, parse_winner
from idavlm.models import BoxFormat
from idavlm.utils import contains_name

IMAGES = [
    ("In the picture a woman wears a hat.", None),
    ("In the picture I see Kate.", None),
    ("In the picture a woman, in image B Kate.", 2),
    ("image II", 2),
    ("Option I.", 1),
    ("I believe it is Image 2 because the hair matches, while Image 1, 3, and 4 show different people.", 2),
    ("Image 1: different person. Image 2: different. Image 3: same person. Image 4: different.\nSo Image 3.", 3),
    ("Image 1: no. Image 2: no. Image 3: yes. Image 4: no.", 3),
    ("The person in image 3 matches the reference image.", 3),
    ("Definitely image 4; images 1-3 are other people", 4),
    ("The correct answer is B) Image 2", 2),
    ("The answer is not image 2 but image 1", 1),
    ("Kate isn't in any image.", None),
    ("应该是第2张图片, 不是第1张", 2),
    ("3\ufe0f\u20e3", 3),
    ("\u2462", 3),
    ("Picture 3", 3),
    ("It is picture three.", 3),
    ("Image 4, not Image 1", 4),
    ("image4", 4),
    ("The photo #2 shows Kate", 2),
    ("It is #\n 2", 2),
    (" 2. ", 2),
    ("Picture 12", 12),
    ("She wears 2 hats", None),
    ("pictures", None),
    ("", None),
    ("The third image shows her.", 3),
    ("the 3rd of them", 3),
    ("Image one", 1),
    ("Option C", 3),
    ("(B)", 2),
    ("B.", 2),
    ("b", 2),
    ("D", 4),
    ("**Image 2**", 2),
    ("Not image 1, but image 3.", 3),
    ("It is not Image 1, 2 or 3 but Image 4.", 4),
    ("Image 1 is not Kate. Image 2 is.", 2),
    ("Images 1, 2 and 3 do not show her; image 4 does.", 4),
    ("Image 1 or 2", None),
    ("Image 1 and Image 3", None),
    ("图三", 3),
    ("第二张图片", 2),
    ("图片4", 4),
    ("答案是第四张。", 4),
    ("不是图一,而是图二", 2),
    ("图4不是图1", 4),
    ("图4不是凯特, 图1是", 1),
    ("Kate is in Image 2. Image 1 shows someone else.", 2),
    ("Image 1 shows another woman, Image 3 shows Kate.", 3),
    ("<think>Maybe image 1? No.</think>Image 2", 2),
    ("Looking at image 1 and image 2 ... The answer is: image 3", 3),
    ("Answer: 4", 4),
    ("Answer: D", 4),
    ("I think it is 3.", 3),
    ("I cannot tell.", None),
    ("None of the images show her.", None),
    ("Image 7", 7),
    ("Image #1.", 1),
    ("image_2", 2),
    ("Image number 4", 4),
    ("Kate is the woman in the second photo, with a red hat.", 2),
    ("Image 4", 4),
    ("2) Image 2", 2),
    ("The correct one is image two rather than image one.", 2),
    ("Image 3 (not 1, 2 or 4)", 3),
    ("Neither image 1 nor image 2; it's image 3.", 3),
    ("Picture Ⅲ", 3),
    ("A woman in a hat", None),
    ("I see four people.", None),
    ("In image 3, I can see Kate. She is not in image 4.", 3),
    ("Image 2 is the same person as the reference.", 2),
    ("The last one", None),
    ("Image 10% sure", None),
    ("It isn't image 4. It's image 1.", 1),
    ("She appears in 2 of the images, image 3 most clearly.", 3),
    ("3: the woman in red", 3),
    ("Kate is not in Image 1, Image 2, or Image 3, so she must be in Image 4.", 4),
    # JSON, tags, LaTeX, Markdown
    (r"\boxed{3}", 3),
    (r"$\boxed{\text{Image 2}}$", 2),
    (r"The person is in image \(3\).", 3),
    ('{"answer": 3}', 3),
    ('{"answer": "Image 2"}', 2),
    ('```json\n{"answer": "Image 2"}\n```', 2),
    ('{"reasoning": "Image 1 shows a man, image 4 a child.", "answer": 2}', 2),
    ('{"answer": 2, "reasoning": "Image 1 shows a man, image 4 a child."}', 2),
    ('{"answer": 2, "reasoning": "Image 1 shows a man, ima', 2),
    ("{'answer': 'Image 2'}", 2),
    ('{"image": 2, "confidence": 0.9}', 2),
    ('{"image_number": "3"}', 3),
    ('{"result": {"image": 4}}', 4),
    ('{"1": false, "2": true, "3": false, "4": false}', 2),
    ('{"image_1": "no", "image_2": "no", "image_3": "yes"}', 3),
    ("<answer>3</answer>", 3),
    ("<think>Image 1 or 2?</think>\n<answer>\nImage 2\n</answer>", 2),
    ("<|begin_of_box|>3<|end_of_box|>", 3),
    ("<image 3>", 3),
    ("[Image 3]", 3),
    ("**Answer:** Image 2", 2),
    ("**Answer: 2**", 2),
    ("### Final Answer\n\n**3**", 3),
    ("The answer is **3**.", 3),
    ("| Image | Match |\n|---|---|\n| 1 | no |\n| 2 | yes |\n| 3 | no |", 2),
    ("1: no\n2: yes\n3: no", 2),
    ("1. Image 1: a man with a beard.\n2. Image 2: the same woman as in the reference.\n3. Image 3: a child.\n\n"
     "Therefore, the answer is image 2.", 2),
    ("1. The reference shows a woman with blond hair.\n2. Image 3 shows the same woman.", 3),
    ("Image 3<|im_end|>", 3),
    # thinking
    ("She has red hair, image 1 does not.</think>Image 3", 3),
    ("<think>Image 1? Image 2? I think image 4</think>\n\n**Image 4**", 4),
    ("<think>Image 1 shows a man and image 2", None),
    ("◁think▷Perhaps image 1◁/think▷Image 2", 2),
    ("[THINK]Perhaps image 1[/THINK]Image 2", 2),
    # the final verdict
    ("Image-3", 3),
    ("img_3.jpg", 3),
    ("Image (3)", 3),
    ("Image: 3", 3),
    ("Image 4 of 4", 4),
    ("Answer: 3, because image 1 and image 2 show other people.", 3),
    ("The answer is 2 because she wears the same hat.", 2),
    ("Final answer: the third image.", 3),
    ("At first glance image 1 looks similar, but the face in image 3 matches.", 3),
    ("Image 1? No. Image 2? No. Image 3? Yes.", 3),
    ("It could be image 1 or image 2. I would go with image 2.", 2),
    ("Image 2 or image 3, I cannot decide.", None),
    ("Both image 2 and image 3 show Kate.", None),
    ("I cannot identify people in images.", None),
    ("I'm not sure, but I think it is image 2.", 2),
    ("Not image 2; rather image 4.", 4),
    ("Kate appears in image 3 (not in images 1, 2 or 4).", 3),
    ("Only the second image shows the person.", 2),
    ("The person in the first reference image is shown again in image 4.", 4),
    ("Reference images 1-2 show Kate; the match is Picture 3.", 3),
    ("Looking at the hair, eyes and nose, the best match is number 2.", 2),
    ("I pick #4.", 4),
    ("I choose image 3. It is the only one with a red hat.", 3),
    ("The answer is image 1. Wait, the hair differs. The answer is image 3.", 3),
    ("Image 2 looks a bit similar.\nFinal answer: I don't know.", None),
    ("So the answer is not image 1, 2 or 3, it is image 4.", 4),
    ("In 2 of 4 images there is a woman.", None),
    ("There are 3 people in the image.", None),
    ("Kate is 3 years old.", None),
    ("She is in image 2 at the top left, next to a 4-door car.", 2),
    ("None", None),
    # other languages
    ("第三张照片里的人是小明。", 3),
    ("答案：图2，因为发型相同。", 2),
    ("图1和图2都不是她，图4才是。", 4),
    ("应该选第二张。", 2),
    ("我认为是图3，而不是图1。", 3),
    ("画像3です。", 3),
    ("3枚目の画像に写っています。", 3),
    ("정답은 3번입니다.", 3),
    ("이미지 2", 2),
    ("La imagen 3 muestra a Kate.", 3),
    ("Kate está en la tercera imagen.", 3),
    ("L'image 2 montre Kate, l'image 1 montre une autre personne.", 2),
    ("La réponse est la deuxième image.", 2),
    ("Kate ist auf Bild 3 zu sehen.", 3),
    ("Die Antwort ist Bild 2.", 2),
    ("Bild Nr. 4", 4),
    ("Изображение 4", 4),
    ("Ответ: 2", 2),
    ("A resposta é a imagem 3.", 3),
    ("الصورة 3", 3),
    ("तस्वीर 2 में केट है।", 2),
    ("Hình 2", 2),
    # as Qwen3-VL, InternVL 3.5, Gemma 3, GPT, Claude and thinking models write, in several languages
    ("Based on the reference, **Kate** appears in **Image 3**.", 3),
    ("The character Kate is shown in **Picture 2**, wearing a blue dress and holding a book. In Picture "
     "1, the person has short hair.", 2),
    ('```json\n{\n  "match": 2,\n  "explanation": "Same hair as in the reference photo"\n}\n```', 2),
    ("Got it, let's look at the images. Image 1 is a man. Image 2 is a girl with a bow. So the answer sh"
     "ould be image 4.\n</think>\n\nImage 4", 4),
    ("Let's compare:\n- **Image 1**: ❌ different hair\n- **Image 2**: ❌ different face\n- **Image 3**:"
     " ✅ same person\n- **Image 4**: ❌ a child", 3),
    ("Kate is in the **fourth** image.", 4), ("Picture 1\n\n*(Kate is the woman in the red coat on the right.)*", 1),
    ("The image that shows Kate is the first one.", 1),
    ("<think>\nThe reference has a scar. Image-1 no scar. Image-2 has one.\n</think>\n\nImage-2", 2),
    ("The image showing Kate is Image-4.", 4), ("Image-3: Kate", 3),
    ("Kate can be seen in Image-1, where she's sitting at the table.", 1),
    ("Here's my analysis:\n\n*   **Image 1:** This shows a different woman.\n*   **Image 2:** This appea"
     "rs to be Kate.\n*   **Image 3:** A man.\n\n**Therefore, the answer is Image 2.**", 2),
    ("Okay, let's analyze the images to find Kate. \n\nThe correct answer is **Image 3**. \n\nHere's why"
     ": Image 1 and 2 show men, and Image 4 a child.", 3),
    ("Image 2 — the woman in the green jacket matches the reference photo of Kate.", 2),
    ("I don't identify real people, but the person who looks most similar to the reference is in Image 3"
     ".", 3),
    ("The closest match is Image 4.", 4), ("My best guess would be Image 1 (though I'm not fully certain).", 1),
    ("Most likely image 2, though image 3 is also plausible.", 2), ("Image 3 (confidence: 85%)", 3),
    ("**Image 1** ✅", 1), ("I'd go with #3.", 3), ("2️⃣", 2), ("Image № 2", 2), ("Answer: Image\xa03", 3),
    ("Final Answer: (Image 2)", 2), ("$$\\boxed{\\text{Image } 3}$$", 3), ("\\boxed{\\textbf{2}}", 2),
    ('{"answer": [3]}', 3), ('{"thought": "Image 1 shows a man.", "final_answer": "Picture 4"}', 4),
    ("<answer>Image 2: Kate</answer>", 2), ("凯特在第3张图片中。", 3),
    ("根据参考图片，凯特出现在图片2中，图片1是另一个人。", 2), ("正确答案是图片四。", 4), ("选择：图2", 2),
    ("四张图中，只有第二张是凯特。", 2), ("ケイトは2枚目の写真に写っています。", 2), ("正解は画像4です。", 4),
    ("ケイトがいるのは3番目の画像です。", 3), ("Kate ist im zweiten Bild zu sehen.", 2),
    ("Bild 3 zeigt Kate, Bild 1 zeigt eine andere Frau.", 3), ("Auf dem dritten Foto.", 3),
    ("Kate befindet sich auf Foto 2.", 2), ("كيت موجودة في الصورة 2.", 2), ("الصورة رقم 3", 3),
    ("الإجابة هي الصورة ٤.", 4), ("세 번째 이미지입니다.", 3), ("사진 4에 있습니다.", 4), ("C'est l'image n° 2.", 2),
    ("Kate est sur la quatrième image.", 4),
    ("Kate does not appear in any of the four images.", None),
    ("I can't tell who these people are from their faces.", None), ("0", None),
    ("All four images show the same woman.", None), ("Images 1 and 4.", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), IMAGES)
def test_image_numbers(text, number):
    assert parse_image_number(text) == number


def test_image_numbers_of_a_known_count_and_name():
    assert parse_image_number("Image 7", count=4) is None
    assert parse_image_number("Image 4", count=4) == 4
    several = "Image 1 shows Tom. Image 2 shows Kate. Image 3 shows a dog."
    assert parse_image_number(several, name="Kate") == 2
    assert parse_image_number(several, name="Mia") is None
    listed = "\n1. A woman with black hair\n2. A woman with red hair\n3. A man\n\n**Image 2** shows Kate."
    assert parse_image_number(listed, name="Kate") == 2
    assert parse_image_number("La segunda imagen es Kate; la primera no lo es.", name="Kate") == 2
    other = "Image 1 shows Joanna. Image 2 shows Ann."
    assert parse_image_number(other, name="Ann") == 2, "a name is a whole word"


LETTERS = [
    ("The answer is (C).", "C"),
    ("Image 30", None),
    ("The answer is B because a car moves.", "B"),
    ("Answer: D, not B", "D"),
    ("A", "A"), ("a)", "A"), ("A.", "A"), ("[[C]]", "C"), ("【B】", "B"), ("Ⓑ", "B"), ("`C`", "C"),
    ("C<|im_end|>", "C"), ("C</s>", "C"),
    # the option with its text
    ("B. A fern", "B"), ("B) A fern", "B"), ("B: a fern", "B"), ("**B**. A fern", "B"), ("**B. A fern**", "B"),
    ("(B) A fern", "B"), ("B - A fern", "B"), ("A. Dog", "A"), ("E. None of these", "E"),
    # JSON, tags, LaTeX, Markdown
    (r"\boxed{C}", "C"), (r"$\boxed{\text{(B)}}$", "B"), (r"\(\boxed{\mathrm{D}}\)", "D"),
    ("Final Answer: $\\boxed{B}$", "B"),
    ('{"answer": "B"}', "B"), ('{"answer": "B. A fern"}', "B"), ('{"option": "c"}', "C"),
    ('```json\n{"choice": "C", "reason": "A lamp is not visible."}\n```', "C"),
    ("<answer>B</answer>", "B"), ("<answer> (C) A dog </answer>", "C"), ("<answer>\nA: a lamp\n</answer>", "A"),
    ("Let me think. A lamp is on the left, so B or C.</think>B", "B"),
    ("**Final Answer: C**", "C"), ("## Answer\nC", "C"), ("**Answer**\n\nC. A dog", "C"),
    # after a marker
    ("The correct option is (C).", "C"), ("Option B is correct.", "B"), ("I choose C.", "C"),
    ("I would pick option D.", "D"), ("It's B.", "B"), ("It must be C, since the lamp is off.", "C"),
    ("My answer is A.", "A"), ("The answer is A because the cup is blue.", "A"), ("Answer: A", "A"),
    ("The best answer is:\n\nB", "B"), ("Answer:B", "B"), ("answer is:b", "B"), ("ANSWER: (b)", "B"),
    ("Answer - C", "C"), ("Ans: D", "D"), ("The answer is option C, a dog.", "C"),
    # the final verdict
    ("Not A but C.", "C"), ("Not A, B or C, so D.", "D"), ("It is neither A nor B. It is C.", "C"),
    ("Between A and B, I choose B.", "B"), ("A or B", None), ("A and B", None), ("Both A and C are correct.", None),
    ("A is wrong because the lamp is off, B is right.", "B"), ("A: wrong\nB: right\nC: wrong", "B"),
    ("Option A says a lamp, but there is none. Option B says a fern, which is visible. So B.", "B"),
    ("The answer is (B) rather than (A).", "B"), ("Definitely not B. I say C.", "C"),
    ("I was going to say A, but the answer is B.", "B"),
    # no choice
    ("All of them.", None), ("None of the above.", None), ("A woman stands there.", None),
    ("A lamp is beside her.", None), ("I see a lamp.", None), ("I don't know.", None),
    ("I cannot identify people in images.", None), ("Vitamin C", None), ("", None),
    # other languages
    ("答案是B。", "B"), ("选C", "C"), ("正确答案：D", "D"), ("我选择A", "A"), ("答案是B，不是A", "B"),
    ("应该选B选项。", "B"), ("答え：C", "C"), ("正解はBです", "B"), ("정답: B", "B"), ("답은 C입니다.", "C"),
    ("Respuesta: B", "B"), ("La respuesta correcta es la C.", "C"), ("La opción B es correcta.", "B"),
    ("Réponse : C", "C"), ("La bonne réponse est B.", "B"), ("Die richtige Antwort ist C.", "C"), ("Antwort: B", "B"),
    ("A resposta correta é B.", "B"), ("Правильный ответ: B", "B"), ("الإجابة: B", "B"), ("उत्तर: C", "C"),
    ("Đáp án: B", "B"),
    # as Qwen3-VL, InternVL 3.5, Gemma 3, GPT, Claude and thinking models write, in several languages
    ("**Answer:** B", "B"), ("**B)** Pizza", "B"), ("The correct answer is **C. A red hat**.", "C"),
    ("Answer: **(D)**", "D"), ("Based on the image, <sks> is holding a cup, so the answer is **A**.", "A"),
    ("Correct option: B", "B"), ("Selected option: C", "C"), ("My choice: D", "D"), ("→ B", "B"),
    ("**Final answer:** $\\boxed{\\text{C}}$", "C"), ("Thus the answer is \\(\\boxed{A}\\).", "A"),
    ("\\boxed{B. \\text{Pizza}}", "B"),
    ("<think>Options: A lamp, B fern. It's a fern.</think>\n\nThe answer is B.", "B"),
    ("So the correct one is C, the hat.\n</think>\nC", "C"), ('{"answer": "(C)"}', "C"),
    ('{"selected_option": "B", "confidence": 0.9}', "B"), ('{"correct_answer": "D"}', "D"), ("```\nB\n```", "B"),
    ("Option: B", "B"), ("B is the correct answer.", "B"), ("B, because there is a fern next to it.", "B"),
    ("I would choose option (C) because the cat is sleeping.", "C"), ("The answer should be D.", "D"),
    ("The correct choice is option A: a lamp.", "A"),
    ("Let's see.\nA. lamp - no\nB. fern - yes\nC. hat - no\nAnswer: B", "B"), ("A: ❌\nB: ❌\nC: ✅\nD: ❌", "C"),
    ("A) ✗ B) ✓ C) ✗", "B"), ("Neither A nor C is right; D is.", "D"), ("It can't be A or B. I'd say C.", "C"),
    ("Not A.", None), ("None of the options is correct.", None),
    ("I'm sorry, but I can't determine that from the image.", None), ("A or C, hard to say.", None), ("**A**", "A"),
    ("(a) lamp", "A"), ("A: lamp", "A"), ("A — a lamp", "A"), ("Choice B", "B"),
    ("B\n\nExplanation: The image shows a fern, while A (a lamp) is not visible.", "B"),
    ("B. A fern.\n\nA lamp is not visible in the image.", "B"), ("答案：**C**", "C"), ("正确答案是（B）", "B"),
    ("选项C是正确的。", "C"), ("因此，答案选D。", "D"), ("B选项正确", "B"), ("正解は「C」です。", "C"),
    ("選択肢Bが正しいです。", "B"), ("答えはBです。", "B"), ("Die Antwort lautet: C", "C"), ("Antwort: B) Pizza", "B"),
    ("Option B ist richtig.", "B"), ("Richtig ist D.", "D"), ("الجواب هو B", "B"), ("الإجابة الصحيحة هي C.", "C"),
    ("الخيار B", "B"), ("정답은 B입니다.", "B"), ("La réponse correcte est l'option C.", "C"),
    ("La respuesta es: D", "D"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_letters(text, letter):
    assert parse_letter(text) == letter


def test_letters_of_a_known_count():
    assert parse_letter("E", count=4) is None
    assert parse_letter("D", count=4) == "D"


SIZE = (500, 1000)  # height, width
KATE = [120, 40, 630, 490]
TOM = [700, 100, 900, 400]
BOTH = '[{"bbox_2d": [700, 100, 900, 400], "label": "Tom"}, {"bbox_2d": [120, 40, 630, 490], "label": "Kate"}]'
BOXES = [
    ("[120, 40, 630, 490]", KATE),
    ("(120,40),(630,490)", KATE),
    ("<box>(120,40),(630,490)</box>", KATE),
    ("<ref>Kate</ref><box>(120,40),(630,490)</box>", KATE),
    ("<|box_start|>(120,40),(630,490)<|box_end|>", KATE),
    ("120, 40, 630, 490", KATE),
    ("120,40,630,490.", KATE),
    ("120 40 630 490", KATE),
    ("[120 40 630 490]", KATE),
    ("[[120, 40, 630, 490]]", KATE),
    ('{"bbox_2d": [120, 40, 630, 490], "label": "Kate"}', KATE),
    ('```json\n[{"bbox_2d": [120, 40, 630, 490]}]\n```', KATE),
    ('{"x1": 120, "y1": 40, "x2": 630, "y2": 490}', KATE),
    ("xmin=120, ymin=40, xmax=630, ymax=490", KATE),
    ("left: 120, top: 40, right: 630, bottom: 490", KATE),
    ("x: 120, y: 40, width: 510, height: 450", KATE),
    ("The top left corner is (120, 40) and the bottom right corner is (630, 490).", KATE),
    ("from (120, 40) to (630, 490)", KATE),
    ("Kate, who is 34, stands at [120, 40, 630, 490] beside 2 friends.", KATE),
    ("[630, 490, 120, 40]", KATE),
    ("[630, 40, 120, 490]", KATE),
    ("(630,490),(120,40)", KATE),
    ("[120.0, 40.0, 630.0, 490.0]", KATE),
    ("[120px, 40px, 630px, 490px]", KATE),
    ("[120,40,630,490", KATE),
    ("[120; 40; 630; 490]", KATE),
    ("\uff3b120\uff0c40\uff0c630\uff0c490\uff3d", KATE),
    ("[-30, -10, 630, 510]", [0, 0, 630, 500]),
    ("[1200, 600, 1500, 900]", None),
    ("[120, 40, 120, 490]", None),
    ("Kate is at [120, 40, 630, 490], Tom at [700, 100, 900, 400].", KATE),
    ("Tom is at [700, 100, 900, 400], Kate at [120, 40, 630, 490].", KATE),
    ("<ref>Tom</ref><box>(700,100),(900,400)</box><ref>Kate</ref><box>(120,40),(630,490)</box>", KATE),
    ("[120, 40, 630, 490] or [700, 100, 900, 400]", KATE),
    ("not [700, 100, 900, 400] but [120, 40, 630, 490]", KATE),
    ("Perhaps [700, 100, 900, 400]? The answer is [120, 40, 630, 490].", KATE),
    ("<think>[700, 100, 900, 400]?</think>[120, 40, 630, 490]", KATE),
    ("She is on the left.", None),
    ("", None),
    ("[120, 40, 630]", None),
    ("[120, 40, 630, 490, 7]", None),
    ("There are 3 people, 2 of them women, 1 child and 4 dogs.", None),
    ("[0.12, 0.08, 0.63, 0.98]", None),
    ("<box></box> [120, 40, 630, 490]", None),
    ("[12%, 8%, 63%, 98%]", None),
    ("[700, 100, 900, 400]", TOM),
    # JSON
    (BOTH, KATE),
    ('[{"bbox_2d": [120, 40, 630, 490], "label": "Kate"}, {"bbox_2d": [700, 100, 900, 400], "label": "Tom"}]', KATE),
    ('[{"label": "Tom", "bbox_2d": [700, 100, 900, 400]}, {"label": "Kate", "bbox_2d": [120, 40, 630, 490]}]', KATE),
    (f"Here are the boxes:\n```json\n{BOTH}\n```\nBoth are visible.", KATE),
    (BOTH.replace('"', "'"), KATE),
    (BOTH.replace("}, {", "}\n{").strip("[]"), KATE),
    ('{"Tom": [700, 100, 900, 400], "Kate": [120, 40, 630, 490]}', KATE),
    ('{"Tom": {"bbox": [700, 100, 900, 400]}, "Kate": {"bbox": [120, 40, 630, 490]}}', KATE),
    ('{"objects": [{"name": "Tom", "box": [700, 100, 900, 400]}, {"name": "Kate", "box": [120, 40, 630, 490]}]}', KATE),
    ('[{"bbox": [700, 100, 900, 400, 0.99], "label": "Tom"}, {"bbox": [120, 40, 630, 490, 0.98], "label": "Kate"}]',
     KATE),
    ("[120, 40, 630, 490, 0.98]", KATE),
    ('[{"bbox_2d": [120, 40, 630, 490], "label": "Kate"}, {"bbox_2d": [700, 1', KATE),
    ('[{"label": "Tom", "bbox_2d": [700, 100, 900, 400]}, {"label": "Kate", "bbox_2d": [120, 40, 630, 490', KATE),
    ('[{"bbox_2d": [120, 40, 630, 490,], "label": "Kate",},]', KATE),
    ('{"bbox_2d": [120, 40, 630, 490] // Kate\n}', KATE),
    ('{"bbox_2d": "120, 40, 630, 490", "label": "Kate"}', KATE),
    ('{"bbox_2d": "[120, 40, 630, 490]"}', KATE),
    ('{"bbox_2d": [[120, 40], [630, 490]]}', KATE),
    ('{"top_left": [120, 40], "bottom_right": [630, 490]}', KATE),
    ('{"top_left": {"x": 120, "y": 40}, "bottom_right": {"x": 630, "y": 490}}', KATE),
    ('{"bbox": {"xmin": 120, "ymin": 40, "xmax": 630, "ymax": 490}, "name": "Kate"}', KATE),
    ('{"bbox": {"ymin": 40, "xmin": 120, "ymax": 490, "xmax": 630}}', KATE),
    ('{"box": {"left": 120, "top": 40, "width": 510, "height": 450}}', KATE),
    ('{"name": "Kate", "coordinates": {"x": 120, "y": 40, "w": 510, "h": 450}}', KATE),
    ('{"cx": 375, "cy": 265, "w": 510, "h": 450}', KATE),
    ('{"<OD>": {"bboxes": [[700, 100, 900, 400], [120, 40, 630, 490]], "labels": ["Tom", "Kate"]}}', KATE),
    ('{"bbox_2d": null, "label": "Kate"}', None),
    ("[]", None),
    ("```json\n[]\n```\nKate is not in the image.", None),
    ('{"answer": [120, 40, 630, 490]}', KATE),
    ('{"thought": "Tom is at [700, 100, 900, 400]", "answer": {"bbox_2d": [120, 40, 630, 490]}}', KATE),
    ('{"bbox_2d": [120.0, 40.0, 630.0, 490.0], "label": "Kate", "confidence": 0.87}', KATE),
    ('[{"bbox_2d": [700, 100, 900, 400], "label": "Kateryna"}, {"bbox_2d": [120, 40, 630, 490], "label": "Kate"}]',
     KATE),
    ('[{"bbox_2d": [700, 100, 900, 400], "label": "man beside Kate"}, {"bbox_2d": [120, 40, 630, 490], '
     '"label": "Kate"}]', KATE),
    ('{"bbox_2d": [120, 40, 630, 490], "label": "woman", "sub_label": "red hat"}', KATE),
    # tags of models
    ("<|object_ref_start|>Tom<|object_ref_end|><|box_start|>(700,100),(900,400)<|box_end|>"
     "<|object_ref_start|>Kate<|object_ref_end|><|box_start|>(120,40),(630,490)<|box_end|>", KATE),
    ("<ref>Kate</ref><box>[[120, 40, 630, 490]]</box>", KATE),
    ("<|ref|>Kate<|/ref|><|det|>[[120, 40, 630, 490]]<|/det|>", KATE),
    ("<ref>Kate</ref><box>120 40 630 490</box>", KATE),
    ("<|begin_of_box|>[[120, 40, 630, 490]]<|end_of_box|>", KATE),
    ("<bbox>120, 40, 630, 490</bbox>", KATE),
    ("<box><x1>120</x1><y1>40</y1><x2>630</x2><y2>490</y2></box>", KATE),
    ("<object><name>Kate</name><bndbox><xmin>120</xmin><ymin>40</ymin><xmax>630</xmax><ymax>490</ymax></bndbox>"
     "</object>", KATE),
    ('<points x1="12.5" y1="40.2" alt="Kate">Kate</points>', None),
    ("[120, 40, 630, 490]<|im_end|>", KATE),
    # thinking and final answers
    ('<think>The man at [700, 100, 900, 400] is Tom.</think>\n[{"bbox_2d": [120, 40, 630, 490], "label": "Kate"}]',
     KATE),
    ("The man at [700, 100, 900, 400] is Tom.</think>\n\n<answer>[120, 40, 630, 490]</answer>", KATE),
    ('<answer>{"bbox_2d": [120, 40, 630, 490]}</answer>', KATE),
    ("I first thought [700, 100, 900, 400], but wait, the correct box is [120, 40, 630, 490].", KATE),
    ("[700, 100, 900, 400] is too small.\n**Final answer:** [120, 40, 630, 490]", KATE),
    # LaTeX and Markdown
    (r"\boxed{[120, 40, 630, 490]}", KATE),
    ("The box is $[120, 40, 630, 490]$.", KATE),
    (r"$x_1 = 120,\ y_1 = 40,\ x_2 = 630,\ y_2 = 490$", KATE),
    (r"$x_{\min} = 120, y_{\min} = 40, x_{\max} = 630, y_{\max} = 490$", KATE),
    (r"$\left[120, 40, 630, 490\right]$", KATE),
    ("**Tom**: [700, 100, 900, 400]\n**Kate**: [120, 40, 630, 490]", KATE),
    ("- **Tom**: `[700, 100, 900, 400]`\n- **Kate**: `[120, 40, 630, 490]`", KATE),
    ("| Person | x1 | y1 | x2 | y2 |\n|---|---|---|---|---|\n| Tom | 700 | 100 | 900 | 400 |\n"
     "| Kate | 120 | 40 | 630 | 490 |", KATE),
    ("1. Tom (700, 100), (900, 400)\n2. Kate (120, 40), (630, 490)", KATE),
    ("```\n[120, 40, 630, 490]\n```", KATE),
    ("```python\nbbox = (120, 40, 630, 490)\n```", KATE),
    ("bbox_2d: [120, 40, 630, 490]\nlabel: Kate", KATE),
    ("- label: Tom\n  bbox: [700, 100, 900, 400]\n- label: Kate\n  bbox: [120, 40, 630, 490]", KATE),
    ("- bbox: [700, 100, 900, 400]\n  label: Tom\n- bbox: [120, 40, 630, 490]\n  label: Kate", KATE),
    # prose
    ("[700, 100, 900, 400] is Tom, [120, 40, 630, 490] is Kate.", KATE),
    ("[120, 40, 630, 490] is Kate, [700, 100, 900, 400] is Tom.", KATE),
    ("[700, 100, 900, 400] - Tom\n[120, 40, 630, 490] - Kate", KATE),
    ("Here you are:\n[700, 100, 900, 400] - Tom\n[120, 40, 630, 490] - Kate", KATE),
    ("The man at [700, 100, 900, 400] is Tom. The woman at [120, 40, 630, 490] is Kate.", KATE),
    ("Kate's bounding box coordinates are: x1: 120, y1: 40, x2: 630, y2: 490", KATE),
    ("(x1, y1, x2, y2) = (120, 40, 630, 490)", KATE),
    ("[x1, y1, x2, y2]: [120, 40, 630, 490]", KATE),
    ("In this 1000x500 image, Kate is at [120, 40, 630, 490].", KATE),
    ("Top-left corner: (120, 40)\nBottom-right corner: (630, 490)", KATE),
    ("Katherine is at [700, 100, 900, 400] and Kate at [120, 40, 630, 490].", KATE),
    ("[120, 40, 630, 490] (confidence 0.98)", KATE),
    ("Kate is not visible: [0, 0, 0, 0]", None),
    ("I'm sorry, I cannot identify people in images.", None),
    # other languages
    ("图中Tom位于[700, 100, 900, 400]，Kate位于[120, 40, 630, 490]。", KATE),
    ("Kate的边界框是【120，40，630，490】。", KATE),
    ("Tom está en [700, 100, 900, 400] y Kate está en [120, 40, 630, 490].", KATE),
    ("Kate befindet sich bei [120; 40; 630; 490].", KATE),
    ("KateさんはTomさん[700, 100, 900, 400]の左、[120, 40, 630, 490]です。最終回答: [120, 40, 630, 490]", KATE),
    ("[١٢٠, ٤٠, ٦٣٠, ٤٩٠]", KATE),
    # as Qwen3-VL, InternVL 3.5, Gemma 3, GPT, Claude and thinking models write, in several languages
    ('```json\n[\n\t{"bbox_2d": [120, 40, 630, 490], "label": "Kate"}\n]\n```', KATE),
    ('```json\n[\n\t{"bbox_2d": [700, 100, 900, 400], "label": "Tom"},\n\t{"bbox_2d": [120, 40, 630, 490'
     '], "label": "Kate (woman in red)"}\n]\n```', KATE),
    ('[{"bbox_2d": [120, 40, 630, 490], "label": "the woman named Kate"}, {"bbox_2d": [700, 100, 900, 40'
     '0], "label": "the man named Tom"}]', KATE),
    ('[{"bbox_2d": [700, 100, 900, 400], "text_content": "Tom"}, {"bbox_2d": [120, 40, 630, 490], "text_'
     'content": "Kate"}]', KATE),
    ('<think>Kate is on the left, maybe [100, 30, 600, 480].</think>```json\n[{"bbox_2d": [120, 40, 630,'
     ' 490], "label": "Kate"}]\n```', KATE),
    ("Kate[[120, 40, 630, 490]]", KATE), ("The bounding box of Kate is <box>[[120, 40, 630, 490]]</box>.", KATE),
    ("<|begin_of_box|>[120,40,630,490]<|end_of_box|>", KATE),
    ("Kate <|begin_of_box|>[[120,40,630,490]]<|end_of_box|>", KATE), ("**Kate**: `[120, 40, 630, 490]`", KATE),
    ("| Name | x1 | y1 | x2 | y2 |\n|---|---|---|---|---|\n| Tom | 700 | 100 | 900 | 400 |\n| Kate | 120"
     " | 40 | 630 | 490 |", KATE),
    ("1. Tom: (700, 100, 900, 400)\n2. Kate: (120, 40, 630, 490)", KATE),
    ("Bounding box: x_min = 120, y_min = 40, x_max = 630, y_max = 490", KATE),
    ("x_min: 120\ny_min: 40\nx_max: 630\ny_max: 490", KATE),
    ('{"xmin": 120, "ymin": 40, "xmax": 630, "ymax": 490}', KATE),
    ('{"bounding_box": {"x": 120, "y": 40, "width": 510, "height": 450}}', KATE),
    ('{"name": "Kate", "bounding_box": {"x_min": 120, "y_min": 40, "x_max": 630, "y_max": 490}}', KATE),
    ('{"Kate": {"x1": 120, "y1": 40, "x2": 630, "y2": 490}}', KATE), ('{"answer": "[120, 40, 630, 490]"}', KATE),
    ('{"location": "(120, 40), (630, 490)"}', KATE), ("<answer>[120, 40, 630, 490]</answer>", KATE),
    ('<answer>[{"bbox_2d": [120, 40, 630, 490]}]</answer>', KATE), ("$\\boxed{[120, 40, 630, 490]}$", KATE),
    ("$[120, 40, 630, 490]$", KATE), ("\\boxed{(120, 40, 630, 490)}", KATE),
    ("Kate is located at approximately (120, 40) – (630, 490).", KATE),
    ("Top-left: (120, 40), bottom-right: (630, 490)", KATE),
    ("Kate is at coordinates (120, 40) [top-left] and (630, 490) [bottom-right].", KATE),
    ("I'd estimate Kate's bounding box as roughly [120, 40, 630, 490], but I can't be precise.", KATE),
    ("I can't identify people, but the woman in red is at [120, 40, 630, 490].", KATE),
    ("Here is the bounding box for Kate:\n\n[120, 40, 630, 490]\n\nLet me know if you need anything else"
     "!", KATE),
    ("The image is 1000 pixels wide and 500 pixels high. Kate: [120, 40, 630, 490]", KATE),
    ("image_size: 1000x500; bbox: 120,40,630,490", KATE), ("Kate: [120, 40, 630, 490]; score: 0.97", KATE),
    ('[{"label": "Kate", "score": 0.97, "box": {"xmin": 120, "ymin": 40, "xmax": 630, "ymax": 490}}]', KATE),
    ("[[120, 40], [630, 490]]", KATE), ('[{"bbox_2d": [[120, 40], [630, 490]], "label": "Kate"}]', KATE),
    ("(x1=120, y1=40), (x2=630, y2=490)", KATE), ("[120,40,630,490]<|im_end|>", KATE),
    ("Tom is not Kate. Kate: [120, 40, 630, 490]", KATE), ("凯特(Kate)的位置：[120, 40, 630, 490]", KATE),
    ("图中Kate的坐标为（120，40），（630，490）。", KATE), ("左上角(120, 40)，右下角(630, 490)", KATE),
    ("ケイト (Kate) の位置は [120, 40, 630, 490] です。Tomは [700, 100, 900, 400] です。", KATE),
    ("左上 (120, 40)、右下 (630, 490)", KATE),
    ("Die Begrenzungsbox von Kate ist [120, 40, 630, 490], die von Tom [700, 100, 900, 400].", KATE),
    ("Oben links: (120, 40), unten rechts: (630, 490)", KATE), ("إحداثيات Kate هي [120, 40, 630, 490].", KATE),
    ("Kate: [١٢٠، ٤٠، ٦٣٠، ٤٩٠]", KATE), ("```json\n[]\n```", None), ("Kate is not in this image.", None),
    ('{"bbox_2d": [], "label": "Kate"}', None), ("I'm unable to provide bounding boxes for people.", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "box"), BOXES)
def test_boxes_in_pixels(text, box):
    assert BoxFormat("pixels").parse(text, SIZE, name="Kate") == box


@pytest.mark.parametrize("kind", ["qwen", "thousand"])
@pytest.mark.parametrize(("text", "box"), [one for one in BOXES if one[1] in (KATE, TOM)])
def test_the_same_in_thousandths(kind, text, box):
    """Only the meaning of numbers differs: in an image of 999 x 999 pixels, thousandths are pixels."""
    assert BoxFormat(kind).parse(text, (999, 999), name="Kate") == box


def test_the_box_of_each_identity_of_one_answer():
    for text in (BOTH, "Tom: [700, 100, 900, 400]; Kate: [120, 40, 630, 490]"):
        assert BoxFormat("pixels").parse(text, SIZE, name="Tom") == TOM
        assert BoxFormat("pixels").parse(text, SIZE, name="Kate") == KATE
    assert BoxFormat("pixels").read(BOTH, SIZE, name="Mia", other_names=["Kate", "Tom"]) == (None, "none")
    only_tom = "Kate: not visible\nTom: [700, 100, 900, 400]"
    assert BoxFormat("pixels").read(only_tom, SIZE, name="Kate", other_names=["Tom"]) == (None, "none")
    names = '[{"bbox_2d": [700, 100, 900, 400], "label": "Joanna"}, {"bbox_2d": [120, 40, 630, 490], "label": "Ann"}]'
    assert BoxFormat("pixels").parse(names, SIZE, name="Ann") == KATE
    assert BoxFormat("pixels").parse(names, SIZE, name="Joanna") == TOM


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("unit", "[305, 1, 535, 234]", "convention"), ("square", "[0, 0, 276, 235]", "convention"),
        ("thousand", "[0.1, 0.2, 0.5, 0.6]", "convention"), ("pixels", "[0.1, 0.2, 0.5, 0.6]", "convention"),
        ("resized", "[0.1, 0.2, 0.5, 0.6]", "convention"), ("norm1000", "[0.0, 0.0, 1.0, 1.0]", "convention"),
        ("norm1000", "[120, 40, 1600, 900]", "convention"), ("qwen", "[120, 40, 1600, 900]", "convention"),
        ("pixels", "[120, 40, 630, 980]", "convention"), ("resized", "[120, 40, 630, 980]", "convention"),
        ("gemini", "[120, 40, 630, 1980]", "convention"), ("bins32", "[120, 40, 630, 980]", "convention"),
        ("unit", "null", "none"), ("unit", "[0.2, 0.2, 0.2, 0.5]", "empty"), ("pixels", "[0, 0, 0, 0]", "empty"),
        ("square", "[0.1, 0.0, 0.2, 0.1]", "empty"),
    ],
)  # fmt: skip
def test_numbers_of_another_box_format_are_rejected(kind, text, reason):
    assert BoxFormat(kind).read(text, SIZE) == (None, reason)
    assert BoxFormat(kind).parse(text, SIZE) is None


def test_the_padded_square_of_inner_adaptors():
    assert BoxFormat("square").parse("[0.12, 0.29, 0.63, 0.74]", SIZE) == pytest.approx([120, 40, 630, 490])


def test_gemini_writes_y_first():
    text = '```json\n[{"box_2d": [80, 120, 980, 630], "label": "Kate"}]\n```'
    assert BoxFormat("gemini").parse(text, SIZE, name="Kate") == pytest.approx([120, 40, 630, 490])
    named = '{"ymin": 80, "xmin": 120, "ymax": 980, "xmax": 630}'
    assert BoxFormat("gemini").parse(named, SIZE) == pytest.approx([120, 40, 630, 490])


def test_a_size_is_needed_unless_numbers_are_pixels():
    assert BoxFormat("pixels").parse("[120, 40, 2630, 490]", None) == [120, 40, 2630, 490]
    with pytest.raises(ValueError, match=r"image_size=None, but boxes of kind 'qwen'"):
        BoxFormat("qwen").parse("[1, 2, 3, 4]", None)


REFUSED = "refused"
YES_NO = [
    ("Yes", True), ("yes.", True), ("YES!", True), ("Yes, that is Kate, not Tom.", True), ("No", False), ("no,", False),
    ("No, it is not.", False), ("Nope", False), ("The answer is yes.", True), ("The answer is: no", False),
    ("I don't see her.", False), ("She is not in the picture.", False), ("True", True), ("False", False),
    ("**Yes**", True), ("(yes)", True), ("是", True), ("是的。", True), ("不是", False), ("没有", False), ("否", False),
    ("It isn't her.", False), ("Correct.", True), ("Incorrect", False), ("<think>no?</think>Yes", True),
    ("No doubt? The answer is yes", True), ("Kate", None), ("", None), ("Maybe", None), ("eyes", None),
    ("Norway", None),
    ("I know nothing.", None), ("Yeah", True), ("Yes and no", None), ("It doesn't show Kate.", False),
    ("yes\nno", False),
    ("I cannot see Kate here", False), ("Answer: No.", False), ("\"Yes\"", True), ("Not her.", False),
    # refusals and abstentions
    ("I cannot identify people in images.", REFUSED), ("Not sure.", REFUSED), ("对不起，我不知道", REFUSED),
    ("I'm sorry, but I can't help with identifying people.", REFUSED),
    ("I'm unable to determine whether Kate is in this image.", REFUSED), ("I don't know.", REFUSED),
    ("I can't tell.", REFUSED), ("It is impossible to say whether she is there.", REFUSED),
    ("As an AI, I do not identify real people.", REFUSED), ("Unsure", REFUSED), ("Unknown", REFUSED),
    ("Cannot be determined.", REFUSED), ("Sorry, I can’t assist with that.", REFUSED), ("No idea.", REFUSED),
    ("I do not have enough information to answer.", REFUSED), ("It's unclear.", REFUSED),
    ("I can't say yes or no.", REFUSED), ("I won't identify people from their faces.", REFUSED),
    ('{"answer": "unknown"}', REFUSED), ("<answer>I don't know</answer>", REFUSED),
    ("<think>Probably yes.</think>I'm not certain.", REFUSED), ("无法判断。", REFUSED), ("我不能确定", REFUSED),
    ("抱歉，我无法识别图片中的人物。", REFUSED), ("看不清楚", REFUSED), ("わかりません。", REFUSED),
    ("申し訳ありませんが、人物を特定することはできません。", REFUSED), ("모르겠습니다.", REFUSED), ("No sé.", REFUSED),
    ("No estoy seguro.", REFUSED), ("Lo siento, no puedo identificar a personas.", REFUSED),
    ("Je ne sais pas.", REFUSED), ("Je ne peux pas identifier les personnes.", REFUSED),
    ("Ich weiß es nicht.", REFUSED), ("Ich kann keine Personen identifizieren.", REFUSED), ("Não sei.", REFUSED),
    ("Не знаю.", REFUSED), ("لا أعرف", REFUSED), ("मुझे नहीं पता।", REFUSED),
    # no
    ("It is true that she is not here", False), ("It is not true that she is here.", False),
    ("It's false that she is in the image.", False), ("I can't see Kate in this photo.", False),
    ("I'm sorry, but she is not in the image.", False), ("Sorry, no.", False), ("No, I don't think so.", False),
    ("I don't think so.", False), ("There is no woman in this picture.", False),
    ("Nobody in the picture looks like Kate.", False), ("Kate is not in the picture. The photo shows Tom.", False),
    ("None of the people is Kate.", False), ("The person in this image is not Kate.", False),
    ("Kate does not appear in the image.", False), ("Kate is absent.", False), ("Neither of them is Kate.", False),
    ("The woman has brown hair, but Kate is blond. So it is not Kate.", False),
    ("Yes? No. It is someone else.", False), ("Not at all.", False), ("Certainly not.", False),
    ("Unfortunately not.", False), ("I do not see anyone that looks like Kate.", False),
    ("Without a doubt, no.", False), ("I'd say no.", False), ("That is incorrect.", False),
    (r"\boxed{No}", False), ('{"answer": "no"}', False), ('{"present": false}', False), ("**No**, she is not.", False),
    ("Looks like yes at first.</think>No", False), ("She may be there, yet the answer is no", False),
    ("不在。", False), ("图中没有小明。", False), ("不，她不在照片里。", False), ("没看到她", False),
    ("いいえ、写っていません。", False), ("아니요, 없습니다.", False), ("No, no está en la foto.", False),
    ("Kate no está en la foto.", False), ("Non, elle n'est pas là.", False), ("Nein, das ist nicht Kate.", False),
    ("Нет.", False), ("Não, ela não está.", False), ("لا", False), ("नहीं", False), ("ไม่ใช่", False),
    # yes
    ("Yes, but I'm not completely sure.", True), ("There is no doubt that it is Kate.", True),
    ("No doubt about it: yes.", True), ("Yes, Kate is there. No other person is visible.", True),
    ("It is false that she is not here.", True), ("She is in the picture.", True),
    ("Kate is visible on the left.", True), ("I can see Kate in this photo.", True), ("That's correct.", True),
    ("Absolutely!", True), ("Definitely.", True), ("Of course.", True), (r"\boxed{\text{Yes}}", True),
    ('{"answer": "Yes"}', True), ('```json\n{"answer": true}\n```', True), ("Answer: **Yes**", True),
    ("<answer>Yes</answer>", True), ("No... wait, yes.", True), ("At first no, but yes, it is Kate.", True),
    ("I'm not sure, but I think yes.", True), ("Yes — she is not alone.", True), ("Yes, not Tom.", True),
    ("是的，她在照片里。", True), ("有，她在左边。", True), ("对，是她。", True), ("はい、写っています。", True),
    ("네, 있습니다.", True), ("Sí, está en la foto.", True), ("Oui, c'est elle.", True), ("Ja, das ist Kate.", True),
    ("Да.", True), ("Sim.", True), ("نعم", True), ("हाँ", True), ("ใช่", True),
    # neither
    ("Kate and Tom", None), ("A woman with a hat", None), ("She wears a hat.", None),
    # as Qwen3-VL, InternVL 3.5, Gemma 3, GPT, Claude and thinking models write, in several languages
    ("**Yes**, <sks> is visible in the image.", True),
    ("Yes, I can see <bo> in this photo — it's the dog on the left.", True),
    ("Yes. The mug in the photo matches the reference.", True),
    ("Based on the visual features, it appears to be the same dog. So, yes.", True), ("The answer is **Yes**.", True),
    ("<think>The cat has stripes... so no.\nWait, the reference has stripes too. So yes.</think>\nYes", True),
    ("Got it, the mug has the same handle.</think>\n\n**Yes**", True),
    ('{"answer": "yes", "reason": "There is no other dog."}', True), ('{"is_present": true}', True),
    ('{"result": "No"}', False),
    ('```json\n{"present": false, "explanation": "Yes, there is a dog, but not <bo>."}\n```', False),
    ("<answer>no</answer>", False), ("\\boxed{\\text{No}}", False), ("✅ Yes", True), ("❌ No", False), ("❌", False),
    ("👍", None), ("No — this is a different mug.", False),
    ("No, <sks> is not in this photo. The photo shows a white cat.", False), ("Nope, that's a different dog.", False),
    ("It is a different person.", False), ("That is not <bo>.", False),
    ("There's no sign of Kate in the photo.", False), ("Kate isn't present here.", False),
    ("I don't believe this is Kate.", False), ("This doesn't appear to be the same mug.", False),
    ("Kate is nowhere to be seen.", False), ("Only Tom is visible; Kate isn't.", False),
    ("It seems that Kate is present in the image.", True), ("Kate appears on the right side of the picture.", True),
    ("Indeed, that's her.", True), ("Most likely yes.", True), ("Probably not.", False), ("Probably yes", True),
    ("Likely no.", False), ("I believe so.", True), ("Not that I can see.", False),
    ("I'm not able to identify individuals based on their appearance.", REFUSED),
    ("I don't identify people based on facial features, so I can't say whether this is Kate.", REFUSED),
    ("I can't determine from the image alone whether that is Kate.", REFUSED),
    ("I apologize, but I cannot confirm whether Kate is in this photo.", REFUSED),
    ("It's not possible for me to recognize individuals.", REFUSED), ("It's hard to tell.", REFUSED),
    ("Can't say.", REFUSED), ("There is not enough information.", REFUSED),
    ("I cannot identify the person, but yes, the clothes match.", True), ("Yes/No", None), ("Yes or No?", None),
    ("是的，图片中有凯特。", True), ("图中有凯特。", True), ("没有，图中没有凯特。", False),
    ("不是，这是另一只狗。", False), ("看不到凯特。", False), ("我无法确认图中的人是谁。", REFUSED),
    ("抱歉，我不能识别真实人物。", REFUSED), ("答案：否", False), ("答案是：是", True), ("はい、います。", True),
    ("いいえ、いません。", False), ("写っていません。", False), ("人物の特定はできません。", REFUSED),
    ("わかりかねます。", REFUSED), ("はい", True), ("Ja, Kate ist auf dem Foto zu sehen.", True),
    ("Nein, Kate ist nicht auf dem Bild.", False), ("Kate ist nicht zu sehen.", False),
    ("Das kann ich nicht beurteilen.", REFUSED), ("Ich bin mir nicht sicher.", REFUSED),
    ("Das lässt sich nicht erkennen.", REFUSED), ("Ich kann Personen nicht identifizieren.", REFUSED),
    ("نعم، كيت موجودة في الصورة.", True), ("لا، كيت ليست في الصورة.", False),
    ("لا أستطيع التعرف على الأشخاص.", REFUSED), ("لست متأكدًا", REFUSED), ("لا يمكنني تحديد هوية الأشخاص.", REFUSED),
    ("Oui, Kate est visible sur la photo.", True), ("Non, ce n'est pas Kate.", False), ("Sí, es ella.", True),
    ("No puedo confirmar si es ella.", REFUSED), ("네, 사진에 있습니다.", True), ("아니요, 다른 사람입니다.", False),
    ("인물을 식별할 수 없습니다.", REFUSED),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), YES_NO)
def test_yes_and_no_and_refusals(text, said):
    assert parse_yes_no(text) is (None if said == REFUSED else said)
    if said in (None, REFUSED):
        assert is_refusal(text) == (said == REFUSED)


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


NAMES = [
    ("Ann waves.", "Ann", True), ("Joanna waves.", "Ann", False), ("Anna", "Ann", False), ("Hannover", "Ann", False),
    ("Ann's hat", "Ann", True), ("Ann’s hat", "Ann", True), ("It is Ann.", "Ann", True), ("<Ann>", "Ann", True),
    ("**Ann**", "Ann", True), ("_Ann_", "Ann", True), ('"Ann"', "Ann", True), ("(Ann)", "Ann", True),
    ("ANN", "Ann", True), ("Ann2", "Ann", False), ("Ann_2", "Ann", False), ("Kate/Ann", "Ann", True),
    ("Ann👋", "Ann", True), ("@ann", "Ann", True), ("", "Ann", False), ("Ann", "", False),
    ('{"name": "Ann"}', "Ann", True), (r"\text{Ann}", "Ann", True), ("Ann:", "Ann", True), ("| Ann |", "Ann", True),
    ("asks", "sks", False), ("<sks> is here", "sks", True), ("<sks>", "<sks>", True), ("R2-D2 rolls", "R2-D2", True),
    ("R2-D20", "R2-D2", False), ("Mr. T is here", "Mr. T", True), ("Mr. Tim", "Mr. T", False),
    ("Beth\nHardiment", "Beth Hardiment", True), ("Beth  Hardiment", "Beth Hardiment", True),
    ("Elizabeth Hardiment", "Beth Hardiment", False), ("O’Brien", "O'Brien", True), ("Jean–Luc", "Jean-Luc", True),
    ("Ｋａｔｅ", "Kate", True), ("STRAUSS", "Strauß", True),
    # composed and decomposed
    (decomposed("René sings"), "René", True), ("René sings", decomposed("René"), True),
    (decomposed("Renée"), "René", False), ("Rene", "René", False), (decomposed("René"), "Rene", False),
    (decomposed("Zoë"), "Zoe", False), (decomposed("Nguyễn"), "Nguyễn", True), (decomposed("Thảo"), "Tha", False),
    (decomposed("Андрей"), "Андрей", True), (decomposed("Андрей"), "Андреи", False), ("Марианна", "Анна", False),
    ("Анна тут", "Анна", True), ("ΑΛΕΞΗΣ", "Αλεξης", True),
    # vowel signs are no letters
    ("राम घर में है।", "राम", True), ("रामायण", "राम", False), ("रामा", "राम", False), ("राम", "रा", False),
    ("रमा", "रम", False), ("सीता और राम", "सीता", True), ("सीताराम", "सीता", False), ("मोहनी", "मोहन", False),
    ("फ\u093cरहा", "\u095eरहा", True), ("রীনা আছে", "রীনা", True), ("রীনা", "রীন", False), ("ராம்", "ராம", False),
    ("ராமன்", "ராம", False), ("นารีอยู่ในภาพ", "นารี", True), ("มานีกับมานะ", "มานะ", True), ("นี้", "นี", False),
    ("กาน่า", "กาน", False), ("သီရိ", "သီရ", False),
    # scripts without spaces
    ("小明在照片里。", "小明", True), ("图中是小明和小红", "小红", True), ("小红在左边", "小明", False),
    ("Kate在左边", "Kate", True), ("这是Kate。", "Kate", True), ("这是Kate。", "Kat", False),
    ("さくらさんは左です", "さくら", True), ("ﾕｷが", "ユキ", True), ("か\u3099", "か", False),
    (decomposed("がっこ"), "がっこ", True),
    # particles of Korean, joiners
    ("케이트는 왼쪽에 있습니다.", "케이트", True), ("민수가 지수와", "민수", True), ("민수와 지수", "지수", True),
    (decomposed("민수는"), "민수", True), ("안녕하세요", "안", False), ("민수진", "민수", False),
    ("سارة في الصورة", "سارة", True), ("علی\u200cرضا", "علی", False), ("דנה בתמונה", "דנה", True),
    # as Qwen3-VL, InternVL 3.5, Gemma 3, GPT, Claude and thinking models write, in several languages
    ("**Kate** (left) and *Tom* (right)", "Kate", True), ("Kate, Tom, and Mia", "Mia", True),
    ("Kate:Tom", "Tom", True), ("Kate—the woman in red", "Kate", True), ("Kate…", "Kate", True),
    ("Kates hat", "Kate", False), ("Kateʼs hat", "Kate", True), ("Skate", "Kate", False), ("kate123", "Kate", False),
    ("<sks>'s bowl", "<sks>", True), ("<sks>’s bowl", "sks", True), ("<sks1>", "<sks>", False),
    ("the <bo> dog", "<bo>", True), ("bo's", "<bo>", False), ("`<bo>`", "bo", True), ('"name": "Kate"', "Kate", True),
    ("Kate_Smith", "Kate", False), ("Kate-Ann", "Kate", True), ("Mary-Kate", "Kate", True), ("KATE", "Kate", True),
    ("Dr.Kate", "Kate", True), ("#Kate", "Kate", True), ("Kate❤️", "Kate", True),
    ("\\textbf{Kate} waves", "Kate", True), ("Kate\u200b waves", "Kate", True), ("Ka\xadte waves", "Kate", True),
    ("ＫＡＴＥ", "Kate", True), ("凯特和汤姆", "汤姆", True), ("《凯特》", "凯特", True), ("凯特琳", "凯特琳", True),
    ("ケイトは本を読んでいます", "ケイト", True), ("ケイトリン", "ケイトリン", True), ("花子さん", "花子", True),
    ("케이트가", "케이트", True), ("케이트입니다", "케이트", True), ("Jürgen winkt", "Jürgen", True),
    ("Jurgen winkt", "Jürgen", False), ("Jürgens Hut", "Jürgen", False), ("Großmann", "Grossmann", True),
    ("كيت في الصورة", "كيت", True), ("وكيت", "كيت", False), ("كيت،", "كيت", True), ("Иваном", "Иван", False),
    ("İpek", "İpek", True), ("Łukasz stoi", "Łukasz", True), ("D'Artagnan", "Artagnan", True),
    ("Anne-Marie", "Anne-Marie", True), ("Anne‑Marie", "Anne-Marie", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "found"), NAMES)
def test_names_are_whole_words(text, name, found):
    assert contains_name(text, name) is found


def test_the_case_of_names_can_count():
    assert contains_name("a Rose", "Rose", ignore_case=False)
    assert not contains_name("a rose", "Rose", ignore_case=False)


@pytest.mark.parametrize("text", ["the f\u0131rst one", "\u0130mage s\u0131x", "FIRST f\u0130ve", "the n\u0131nth"])
def test_letters_that_count_as_an_i_without_case(text):
    assert parse_image_number(text) in (1, 5, 6, 9)


UNITS = ["[", "(1,2", "1,1,1,1%", "1", " ", "image ", "image 1 ", "#1", "not ", "the ", "is 1 ", "x1=1 ", "<box>", "1 "]
UNITS += ['{"', '{"a":[', "[{", "\\boxed{", "<answer>", "<think>", "</think>", "yes ", "no, ", "Kate", "不", "\\text{"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("before", "after"), [("1", "%"), ("the answer is 1", "not")])
def test_the_time_grows_with_the_length_of_the_answer(before, after, unit):
    """Each answer has 16,000 characters, which takes 0.2 s. Patterns that go back over it take several seconds."""
    text = before + unit * (16_000 // len(unit)) + after
    start = time.process_time()
    parse_image_number(text, name="Kate")
    parse_yes_no(text)
    is_refusal(text)
    contains_name(text, "Kate")
    BoxFormat("bins32").parse(text, (30, 50), name="Kate")
    parse_score(text)
    parse_winner(text)
    assert time.process_time() - start < 2
